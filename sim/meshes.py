"""Simplified meshes for `fast` frames: on a CPU a frame costs its triangles, not its pixels.

Only the renderer reads the faces of a mesh. Contacts read its vertices and its hull, and these stay.
"""

import numpy as np

GRID = 0.008  # metres


def simplify(model, grid: float = GRID) -> None:
    """Merge the vertices of each mesh that share a cell of a grid (metres), before a renderer is made.

    A triangle keeps its normals and texture coordinates. It goes if its corners merge, if it turns its back
    to where it faced, or if an earlier one has the same corners in the same sense.
    """
    for mesh in range(model.nmesh):
        first = model.mesh_faceadr[mesh]
        rows = slice(first, first + model.mesh_facenum[mesh])
        faces, adr = model.mesh_face[rows].copy(), model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[adr : adr + model.mesh_vertnum[mesh]]
        corners = nearest_to_centres(vertices, grid)[faces]  # (F, 3)
        whole = np.flatnonzero((normals(vertices[corners]) * normals(vertices[faces])).sum(axis=1) > 0)
        turn = (corners.argmin(axis=1)[:, None] + np.arange(3)) % 3
        key = np.take_along_axis(corners, turn, axis=1) @ [1 << 40, 1 << 20, 1]
        kept = np.sort(whole[np.unique(key[whole], return_index=True)[1]])
        new = slice(first, first + len(kept))
        model.mesh_face[new] = corners[kept]
        model.mesh_facenormal[new] = model.mesh_facenormal[rows][kept]
        model.mesh_facetexcoord[new] = model.mesh_facetexcoord[rows][kept]
        model.mesh_facenum[mesh] = len(kept)


def normals(triangles: np.ndarray) -> np.ndarray:
    """(F, 3, 3) -> (F, 3), as long as twice the area."""
    return np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])


def nearest_to_centres(vertices: np.ndarray, grid: float) -> np.ndarray:
    """(V, 3) -> (V,): of all vertices in its cell, the number of the one that is nearest to the cell's centre."""
    place = (vertices - vertices.min(axis=0)) / grid
    cells = np.floor(place)
    order = np.argsort(((place - cells - 0.5) ** 2).sum(axis=1), kind="stable")  # nearest first
    key = cells[order] @ [1.0, 1 << 17, 1 << 34]  # exact below 1 km
    _, first, cell = np.unique(key, return_index=True, return_inverse=True)
    nearest = np.empty_like(order)
    nearest[order] = order[first[cell]]
    return nearest
