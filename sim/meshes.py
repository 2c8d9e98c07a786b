"""Simplified meshes for `fast` frames: on a CPU a frame costs its triangles, not its pixels.

Only the renderer reads the faces of a mesh. Contacts read its vertices and its hull, and these stay.
"""

import functools

import numpy as np

GRID = 0.008  # metres


def simplify(model, grid: float = GRID) -> None:
    """Merge the vertices of each mesh that share a cell of a grid (metres), before a renderer is made.

    A triangle keeps its normals and texture coordinates. It goes if two of its corners merge, or if it turns
    its back to where it faced.
    """
    for mesh in range(model.nmesh):
        first, start = model.mesh_faceadr[mesh], model.mesh_vertadr[mesh]
        rows = slice(first, first + model.mesh_facenum[mesh])
        faces, vertices = model.mesh_face[rows], model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
        corners = nearest_to_centres(vertices.tobytes(), grid)[faces]  # (F, 3)
        kept = (normals(vertices[corners]) * normals(vertices[faces])).sum(axis=1) > 0
        new = slice(first, first + kept.sum())
        model.mesh_face[new] = corners[kept]
        model.mesh_facenormal[new] = model.mesh_facenormal[rows][kept]
        model.mesh_facetexcoord[new] = model.mesh_facetexcoord[rows][kept]
        model.mesh_facenum[mesh] = kept.sum()


def normals(triangles: np.ndarray) -> np.ndarray:
    """(F, 3, 3) -> (F, 3), as long as twice the area."""
    return np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])


@functools.lru_cache(200)  # meshes: the next task has most of them too
def nearest_to_centres(vertices: bytes, grid: float) -> np.ndarray:
    """float32 (V, 3) -> (V,): the vertex of its cell that is nearest to the centre."""
    vertices = np.frombuffer(vertices, np.float32).reshape(-1, 3)
    place = (vertices - vertices.min(axis=0)) / grid
    order = np.argsort(((place % 1 - 0.5) ** 2).sum(axis=1), kind="stable")  # nearest first
    cells = (place // 1)[order] @ [1.0, 1 << 17, 1 << 34]  # one number each
    _, first, cell = np.unique(cells, return_index=True, return_inverse=True)
    return order[first[cell]][np.argsort(order)]
