"""Where to grasp: poses of a parallel gripper, computed from points on collision geometry."""

import numpy as np
from scipy.spatial.transform import Rotation

UP = np.array([0.0, 0.0, 1.0])
# The hand points down and its fingers open along the world's y axis.
TOP_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
# The hand as two boxes around the grasp point, in metres: half extents along the opening and across it,
# lowest height above the grasp point.
PALM = (0.112, 0.040, 0.035)
FINGERS = (0.065, 0.018, -0.010)
MAX_OPENING = 0.075  # metres
YAWS = range(-85, 90, 5)  # degrees by which the hand may turn about the vertical
RIM = range(-180, 180, 10)  # degrees around a rim at which the hand may grasp


def surface_points(model, data, geoms: list[int], spacing: float = 0.012) -> np.ndarray:
    """Points (N, 3) on the bounding boxes of geoms, in world coordinates, at most `spacing` metres apart.

    Boxes of cylinders are rounded.
    """
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


def collisions(obstacles: np.ndarray, grasp_point: np.ndarray, opening: np.ndarray) -> int:
    """How many obstacle points (N, 3) lie inside the hand above `grasp_point`, open along `opening` (3,)."""
    offset = obstacles - grasp_point
    u, v = np.abs(offset @ opening), np.abs(offset @ np.cross(UP, opening))
    return sum(int(((u < a) & (v < b) & (offset[:, 2] > low)).sum()) for a, b, low in (PALM, FINGERS))


def top_grasp(points, obstacles, depth: float, yaws=YAWS) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and rotation (3, 3) of a grasp from above, across an object's narrowest side.

    The fingers close `depth` below the top of the object's points (N, 3), but at least 8 mm above its bottom.
    The grasp may move along the object to keep clear of obstacles (M, 3). Of equally good grasps the one
    that turns the hand least wins.
    """
    height = max(points[:, 2].max() - depth, points[:, 2].min() + 0.008)
    # what the fingers touch
    slab = points[(points[:, 2] > height - 0.012) & (points[:, 2] < height + 0.020), :2]
    obstacles = obstacles[np.linalg.norm(obstacles[:, :2] - points[:, :2].mean(0), axis=1) < 0.22]
    best = np.inf
    for yaw in np.deg2rad(yaws):
        opening = np.array([-np.sin(yaw), np.cos(yaw), 0])
        across = np.array([-np.cos(yaw), -np.sin(yaw), 0])
        u, v = slab @ opening[:2], slab @ across[:2]
        width, half_length = np.ptp(u), np.ptp(v) / 2
        for shift in (0, -0.5, 0.5) if half_length < 0.03 else (0, -0.25, 0.25, -0.5, 0.5, -0.75, 0.75):
            along = (v.max() + v.min()) / 2 + shift * half_length
            point = opening * (u.max() + u.min()) / 2 + across * along + UP * height
            hits = collisions(obstacles, point, opening)
            cost = (
                width
                + 10 * (width > MAX_OPENING)
                + (hits > 0)
                + 0.001 * hits
                + 0.01 * abs(yaw)
                + 0.02 * abs(shift)
            )
            if cost < best:
                best, position, turn = cost, point, yaw
    return position, Rotation.from_rotvec(turn * UP).as_matrix() @ TOP_DOWN


def rim_grasp(points, obstacles, middle, base, depth: float, angles) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and rotation (3, 3) of a grasp from above over a rim, with one finger inside.

    points (N, 3): of the bowl or mug; middle (3,): its axis; base (3,): of the robot; depth: of the fingers
    below the rim; angles: degrees around the axis from which to choose.
    The grasp keeps clear of obstacles (M, 3) and of the handle, turns the hand little, and does not stretch
    the arm, which could not bend again.
    """
    offset = points[:, :2] - middle[:2]
    angle, radius = np.arctan2(offset[:, 1], offset[:, 0]), np.linalg.norm(offset, axis=1)
    near_rim = points[:, 2] > points[:, 2].max() - depth - 0.012
    typical = np.median(radius[near_rim & (radius > 0.5 * radius.max())])
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
        opening = np.array([np.cos(phi), np.sin(phi), 0])
        yaw = wrap(phi - np.pi / 2, np.pi / 2)
        for inward in (0, 0.01, 0.018):
            point = np.append(middle[:2], height) + ((wall.max() + wall.min()) / 2 - inward) * opening
            hits = collisions(obstacles, point, opening)
            stretch = max(0, np.linalg.norm((point - base)[:2]) - 0.70)
            cost = 0.02 * abs(yaw) + (hits > 0) + 0.01 * hits + inward + 1.5 * stretch
            if cost < best:
                best, position, turn = cost, point, yaw
    return position, Rotation.from_rotvec(turn * UP).as_matrix() @ TOP_DOWN


def wrap(angle, half: float):
    """The angle in [-half, half) that differs by a multiple of 2 half."""
    return (angle + half) % (2 * half) - half


def turn_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation vector (3,) in world axes that turns rotation matrix a into b."""
    return Rotation.from_matrix(b @ a.T).as_rotvec()


def limit(vector: np.ndarray, norm: float) -> np.ndarray:
    """The vector, shortened to `norm` where it is longer."""
    return vector * min(1.0, norm / max(np.linalg.norm(vector), 1e-12))
