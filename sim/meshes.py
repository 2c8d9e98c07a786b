"""Simplified meshes for `fast` frames: on a CPU a frame costs its triangles, not its pixels.

Only the renderer reads the faces of a mesh. Contacts read its vertices and its hull, and these stay.
"""

import numpy as np

GRID = 0.008  # metres


def simplify(model, grid: float = GRID) -> None:
    """Merge the vertices of each mesh that share a cell of a grid (metres), before a renderer is made.

    A triangle keeps its normals and texture coordinates. It goes if two of its corners merge, or if an
    earlier one has the same corners in the same sense.
    """
    for mesh in range(model.nmesh):
        first = model.mesh_faceadr[mesh]
        rows = slice(first, first + model.mesh_facenum[mesh])
        vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        corners = nearest_to_means(model.mesh_vert[vertices], grid)[model.mesh_face[rows]]  # (F, 3)
        kept = distinct(corners)
        new = slice(first, first + len(kept))
        model.mesh_face[new] = corners[kept]
        model.mesh_facenormal[new] = model.mesh_facenormal[rows][kept]
        model.mesh_facetexcoord[new] = model.mesh_facetexcoord[rows][kept]
        model.mesh_facenum[mesh] = len(kept)


def nearest_to_means(vertices: np.ndarray, grid: float) -> np.ndarray:
    """(V, 3) -> (V,): of all vertices in its cell, the number of the one that is nearest to their mean."""
    cells = ((vertices - vertices.min(axis=0)) // grid).astype(np.int64)
    cell = np.unique(cells @ [1, 1 << 20, 1 << 40], return_inverse=True)[1]
    mean = np.stack([np.bincount(cell, x) for x in vertices.T], axis=1) / np.bincount(cell)[:, None]
    order = np.argsort(-((vertices - mean[cell]) ** 2).sum(axis=1), kind="stable")
    nearest = np.empty(len(mean), np.int64)
    nearest[cell[order]] = order  # the last of a cell stays
    return nearest[cell]


def distinct(corners: np.ndarray) -> np.ndarray:
    """(F, 3) -> numbers of the triangles with three corners, each once per sense of rotation."""
    turn = (corners.argmin(axis=1)[:, None] + np.arange(3)) % 3
    key = np.take_along_axis(corners, turn, axis=1) @ [1 << 40, 1 << 20, 1]
    whole = np.flatnonzero((corners != np.roll(corners, 1, axis=1)).all(axis=1))
    return np.sort(whole[np.unique(key[whole], return_index=True)[1]])
