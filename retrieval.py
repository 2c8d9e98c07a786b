"""Exact nearest neighbours, blocked, and the exact recall of guessing: the figures of 06_pretrain_head.py.

Shapes: Q queries, G rows of the gallery, D dimensions, k neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AT = (1, 5, 10)  # the k of recall@k


def nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    query_id: Tensor | None = None,
    gallery_id: Tensor | None = None,
    block: int = 2048,
) -> Tensor:
    """Rows of the gallery (G, D) with the largest inner products to each query (Q, D), best first: (Q, k). Exact.

    A query never gets a row of its own id (its episode, or itself); -1 stands where there are no k others. No more than
    512 x block products are held at a time.
    """
    found = []
    for first in range(0, len(queries), 512):
        q = queries[first : first + 512]
        own = None if query_id is None else query_id[first : first + 512]
        best = q.new_full((len(q), k), -torch.inf)
        rows = torch.zeros(len(q), k, dtype=torch.long, device=q.device)
        for start in range(0, len(gallery), block):
            products = q @ gallery[start : start + block].T  # (512, block)
            if own is not None:
                ids = gallery_id[start : start + block]
                if (
                    own.min() <= ids.max() and ids.min() <= own.max()
                ):  # numbered in order, most blocks have no id in common
                    products.masked_fill_(own[:, None] == ids, -torch.inf)
            top, at = products.topk(min(k, products.shape[1]), dim=1)
            best, order = torch.cat([best, top], 1).topk(k, dim=1)
            rows = torch.cat([rows, at + start], 1).gather(1, order)
        found.append(rows.masked_fill(best == -torch.inf, -1))
    return torch.cat(found)


def count_right(label, step, of_label, of_step, near: int | None) -> np.ndarray:
    """For each query (label, step), how many gallery frames have its label and a step within `near` (None: any): (Q,)."""
    far = 1 + max(step.max(), of_step.max())  # steps of one label never reach those of the next
    keys = np.sort(of_label * 2 * far + of_step)
    near = far - 1 if near is None else min(near, far - 1)
    low, high = label * 2 * far + np.maximum(step - near, 0), label * 2 * far + step + near
    return np.searchsorted(keys, high, "right") - np.searchsorted(keys, low, "left")


def chance(right: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """Recall@k (Q,) of k different candidates drawn at random, of which `right` are right: 1 - C(c - r, k) / C(c, k)."""
    miss = np.ones(len(right))
    for i in range(k):
        miss *= np.maximum(candidates - right - i, 0) / np.maximum(candidates - i, 1)
    return 1 - miss


def hits(
    x, y, query_id, gallery_id, query_step, gallery_step, kinds: dict
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each kind of right: whether a query's nearest (Q, k) are so, and what guessing gives for recall@AT (Q, len(AT)).

    x (Q, D), y (G, D): unit vectors.  Ids and steps are numpy, (Q,) and (G,).  kinds: name -> (labels of the queries, of the
    gallery, near): right is the same label, and a step within `near` where that is a number.
    A row of the query's own id is never returned, and has the query's labels.
    """
    own, of = torch.from_numpy(query_id).to(x.device), torch.from_numpy(gallery_id).to(x.device)
    rows = nearest(x, y, max(AT), own, of).cpu().numpy()
    excluded = count_right(query_id, query_step, gallery_id, gallery_step, None)
    found = {}
    for name, (label, of_label, near) in kinds.items():
        right = (rows >= 0) & (of_label[rows] == label[:, None])
        if near is not None:
            right &= abs(gallery_step[rows] - query_step[:, None]) <= near
        n = count_right(label, query_step, of_label, gallery_step, near)
        n -= count_right(
            query_id, query_step, gallery_id, gallery_step, near
        )  # the excluded ones are right as well
        found[name] = right, np.stack([chance(n, len(y) - excluded, k) for k in AT], axis=1)
    return found
