"""Where to grasp: poses of a parallel gripper, from sampled points of collision geometry. expert.py moves the hand there."""

import numpy as np
from scipy.spatial.transform import Rotation

UP = np.array([0.0, 0.0, 1.0])
TOP_DOWN = np.array(
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]
)  # hand points down, fingers open along world y
# The hand as two boxes around the grasp point: half extents along (opening, across), lowest height above the grasp point.
PALM, FINGERS, MAX_OPENING = (0.112, 0.040, 0.035), (0.065, 0.018, -0.010), 0.075  # metres
YAWS = range(-85, 90, 5)  # turns of the hand about the vertical that are tried, in degrees
RIM = range(-180, 180, 10)  # places around a rim that are tried, in degrees


def surface_points(model, data, geoms: list[int], spacing: float = 0.012) -> np.ndarray:
    """Points (N, 3) on the bounding boxes of geoms in world coordinates, at most `spacing` apart; cylinders are rounded."""
    clouds = [np.empty((0, 3))]
    for geom in geoms:
        centre, half = model.geom_aabb[geom].reshape(2, 3)
        axes = [np.linspace(-1, 1, int(np.clip(np.ceil(2 * h / spacing) + 1, 2, 25))) for h in half]
        unit = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        unit = unit[np.abs(unit).max(1) > 0.999]  # the surface of the box
        if model.geom_type[geom] in (3, 5):  # mjGEOM_CAPSULE, mjGEOM_CYLINDER
            unit[:, :2] /= np.maximum(np.linalg.norm(unit[:, :2], axis=1, keepdims=True), 1)
        clouds.append(data.geom_xpos[geom] + (centre + unit * half) @ data.geom_xmat[geom].reshape(3, 3).T)
    return np.concatenate(clouds)


def collisions(
    obstacles: np.ndarray, grasp_point: np.ndarray, opening: np.ndarray, across: np.ndarray
) -> int:
    """How many obstacle points (N, 3) lie inside the open hand above grasp_point; opening and across are its unit axes."""
    offset = obstacles - grasp_point
    u, v, z = np.abs(offset @ opening), np.abs(offset @ across), offset[:, 2]
    return sum(int(((u < a) & (v < b) & (z > low)).sum()) for a, b, low in (PALM, FINGERS))


def top_grasp(
    points: np.ndarray, obstacles: np.ndarray, depth: float, yaws=YAWS
) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and rotation (3, 3) of a grasp from above: across the narrowest side of an object, clear of its neighbours.

    points (N, 3) are the object's; the fingers close `depth` below its top, 8 mm above its bottom at least. The grasp may move
    along the object to get clear; among equals the smallest turn of the hand wins.
    """
    height = max(points[:, 2].max() - depth, points[:, 2].min() + 0.008)
    slab = points[
        (points[:, 2] > height - 0.012) & (points[:, 2] < height + 0.020), :2
    ]  # what the fingers will touch
    obstacles = obstacles[np.linalg.norm(obstacles[:, :2] - points[:, :2].mean(0), axis=1) < 0.22]
    best = np.inf
    for yaw in np.deg2rad(yaws):
        opening, across = np.array([-np.sin(yaw), np.cos(yaw), 0]), np.array([-np.cos(yaw), -np.sin(yaw), 0])
        u, v = slab @ opening[:2], slab @ across[:2]
        width, half_length = np.ptp(u), np.ptp(v) / 2
        for shift in (0, -0.5, 0.5) if half_length < 0.03 else (0, -0.25, 0.25, -0.5, 0.5, -0.75, 0.75):
            along = (v.max() + v.min()) / 2 + shift * half_length
            point = opening * (u.max() + u.min()) / 2 + across * along + UP * height
            hits = collisions(obstacles, point, opening, across)
            cost = (
                width
                + 10 * (width > MAX_OPENING)
                + (hits > 0)
                + 0.001 * hits
                + 0.01 * abs(yaw)
                + 0.02 * abs(shift)
            )
            if cost < best:
                best, position, rotation = cost, point, Rotation.from_rotvec(yaw * UP).as_matrix() @ TOP_DOWN
    return position, rotation


def rim_grasp(points, obstacles, middle, base, depth: float, angles) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and rotation (3, 3) of a grasp from above over the rim of a bowl or mug, one finger inside.

    points (N, 3) are the object's, middle (3,) is its axis, base (3,) the robot's; the fingers close `depth` below the rim.
    Among the angles (degrees around the axis) one is best that is clear of obstacles and of the handle, turns the hand little,
    and does not stretch the arm, which cannot leave the straight posture again.
    """
    offset = points[:, :2] - middle[:2]
    angle, radius = np.arctan2(offset[:, 1], offset[:, 0]), np.linalg.norm(offset, axis=1)
    typical = np.median(
        radius[(points[:, 2] > points[:, 2].max() - depth - 0.012) & (radius > 0.5 * radius.max())]
    )
    obstacles = obstacles[np.linalg.norm(obstacles[:, :2] - middle[:2], axis=1) < 0.25]
    best = np.inf
    for phi in np.deg2rad(angles):
        wedge = (np.abs(wrap(angle - phi, np.pi)) < 0.22) & (radius > 0.6 * typical)
        if not wedge.any():
            continue
        height = points[wedge, 2].max() - depth
        wall = radius[wedge & (points[:, 2] > height - 0.012) & (points[:, 2] < height + 0.014)]
        if not len(wall) or wall.max() > 1.25 * typical:  # a handle
            continue
        opening, yaw = np.array([np.cos(phi), np.sin(phi), 0]), wrap(phi - np.pi / 2, np.pi / 2)
        for inward in (0, 0.01, 0.018):
            point = np.append(middle[:2], height) + ((wall.max() + wall.min()) / 2 - inward) * opening
            hits, reach = (
                collisions(obstacles, point, opening, np.cross(UP, opening)),
                np.linalg.norm((point - base)[:2]),
            )
            cost = 0.02 * abs(yaw) + (hits > 0) + 0.01 * hits + inward + 1.5 * max(0, reach - 0.70)
            if cost < best:
                best, position, rotation = cost, point, Rotation.from_rotvec(yaw * UP).as_matrix() @ TOP_DOWN
    return position, rotation


def wrap(angle, half: float):
    """The angle in [-half, half) that differs by a multiple of 2 half."""
    return (angle + half) % (2 * half) - half


def turn_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation vector (3,) in world axes that turns rotation matrix a into b."""
    return Rotation.from_matrix(b @ a.T).as_rotvec()


def limit(vector: np.ndarray, norm: float) -> np.ndarray:
    return vector * min(1.0, norm / max(np.linalg.norm(vector), 1e-12))
