"""The scripted expert that stage 00 records: how it sees, grasps and moves, and what it does in each of LIBERO's 40 tasks.

It sees the simulator's state (poses and collision geometry) and acts through the same 7 numbers as every policy: delta position,
delta rotation, gripper. A task is a row of TASKS: a list of primitives with their parameters. A primitive is a generator of
actions; whoever drives it may disturb the actions, record them, or stop when the task is solved. All primitives share one law of
motion (Expert.towards), look at the scene when they begin, and do not try again: a missed grasp ends the try.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from scipy.spatial.transform import Rotation

import sim
from common import GRIPPER_CLOSE, GRIPPER_OPEN

Actions = Iterator[np.ndarray]
UP = np.array([0.0, 0.0, 1.0])
TOP_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # hand points down, fingers open along world y
SLIDE = 2  # mujoco's mjJNT_SLIDE
SUPPORTS = {"floor", "main_table", "kitchen_table", "living_room_table", "study_table", "coffee_table"}
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


def collisions(obstacles: np.ndarray, grasp_point: np.ndarray, opening: np.ndarray, across: np.ndarray) -> int:
    """How many obstacle points (N, 3) lie inside the open hand above grasp_point; opening and across are its unit axes."""
    offset = obstacles - grasp_point
    u, v, z = np.abs(offset @ opening), np.abs(offset @ across), offset[:, 2]
    return sum(int(((u < a) & (v < b) & (z > low)).sum()) for a, b, low in (PALM, FINGERS))


def top_grasp(points: np.ndarray, obstacles: np.ndarray, depth: float, yaws=YAWS) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and rotation (3, 3) of a grasp from above: across the narrowest side of an object, clear of its neighbours.

    points (N, 3) are the object's; the fingers close `depth` below its top, 8 mm above its bottom at least. The grasp may move
    along the object to get clear; among equals the smallest turn of the hand wins.
    """
    height = max(points[:, 2].max() - depth, points[:, 2].min() + 0.008)
    slab = points[(points[:, 2] > height - 0.012) & (points[:, 2] < height + 0.020), :2]  # what the fingers will touch
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
            cost = width + 10 * (width > MAX_OPENING) + (hits > 0) + 0.001 * hits + 0.01 * abs(yaw) + 0.02 * abs(shift)
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
    typical = np.median(radius[(points[:, 2] > points[:, 2].max() - depth - 0.012) & (radius > 0.5 * radius.max())])
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
            hits, reach = collisions(obstacles, point, opening, np.cross(UP, opening)), np.linalg.norm((point - base)[:2])
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


# ---------------------------------------------------------------------------------------------------------------- expert
class MissedGrasp(Exception):
    """The object did not come along when the hand was lifted."""


class Expert:
    """What the primitives know of the scene (privileged), and the one law of motion that they share."""

    POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5  # metres and radians that OSC_POSE moves its goal by for an action of 1
    GAIN, TURN_GAIN, TURN_SPEED, ACCELERATION = 1.3, 1.4, 0.5, 0.35  # share of the remaining way per step, and bounds

    def __init__(self, env: sim.TaskEnv, rng: np.random.Generator, waypoint_jitter: float):
        self.env, self.last = env, np.zeros(6)  # last: the last clean action, without the gripper
        self.jitter = lambda: rng.uniform(-1, 1, 3) * waypoint_jitter  # of one waypoint, in metres

    @property
    def position(self) -> np.ndarray:
        return self.env.data.site_xpos[self.env.robot.eef_site_id].copy()

    @property
    def base(self) -> np.ndarray:
        return self.env.data.body(self.env.robot.robot_model.root_body).xpos.copy()

    @property
    def rotation(self) -> np.ndarray:
        return self.env.data.site_xmat[self.env.robot.eef_site_id].reshape(3, 3).copy()

    @property
    def gap(self) -> float:  # metres between the fingers, whose coordinates run from -0.04 to 0.04
        return np.ptp(self.env.data.qpos[self.env.robot._ref_gripper_joint_pos_indexes])

    def root(self, name: str) -> str:
        """The body that carries an object or a fixture."""
        return (self.env.env.objects_dict | self.env.env.fixtures_dict)[name].root_body

    def spot(self, name: str) -> np.ndarray:
        """Where something is, (3,): a site (LIBERO's regions), else the origin of an object or fixture."""
        sites = {self.env.model.site(index).name for index in range(self.env.model.nsite)}
        data = self.env.data
        return (data.site(name) if name in sites else data.body(self.root(name))).xpos.copy()

    def points(self, *names: str) -> np.ndarray:
        """Points (N, 3) on the collision geometry of objects and fixtures."""
        model = self.env.model
        return self._points(model.body_rootid, [model.body(self.root(name)).rootid[0] for name in names])

    def _points(self, group: np.ndarray, chosen: list[int]) -> np.ndarray:
        """The same of all bodies whose entry in group, (nbody,), is among the chosen ones."""
        model = self.env.model
        solid = (model.geom_contype | model.geom_conaffinity) > 0
        return surface_points(model, self.env.data, np.flatnonzero(solid & np.isin(group[model.geom_bodyid], chosen)))

    def obstacles(self, target: str) -> np.ndarray:
        return self.points(*sorted({*self.env.env.objects_dict, *self.env.env.fixtures_dict} - SUPPORTS - {target}))

    def touches(self, name: str) -> bool:
        """Whether an object touches anything but the robot."""
        model, data = self.env.model, self.env.data
        roots = model.body_rootid[model.geom_bodyid[data.contact.geom]]  # (contacts, 2)
        target, robot = model.body(self.root(name)).rootid[0], model.body(self.env.robot.robot_model.root_body).rootid[0]
        return bool(((roots == target).any(axis=1) & (roots != robot).all(axis=1)).any())

    def handle(self, joint: str) -> tuple[np.ndarray, np.ndarray]:
        """Of what a joint moves: the part that sticks out most towards opening, (3,), and that direction, (3,).

        LIBERO's drawers and doors are closed at 0 and open at negative coordinates.
        """
        model, data, j = self.env.model, self.env.data, self.env.model.joint(joint).id
        points = self._points(np.arange(model.nbody), [model.jnt_bodyid[j]])
        arm = points.mean(0) - data.xanchor[j]
        out = -data.xaxis[j] if model.jnt_type[j] == SLIDE else -np.cross(data.xaxis[j], arm)
        out = out / np.linalg.norm(out)
        bar = points[points @ out > (points @ out).max() - 0.016]
        return (bar.max(0) + bar.min(0)) / 2, out

    def facing(self, approach: np.ndarray, opening: np.ndarray) -> np.ndarray:
        """Rotation (3, 3) of a hand that points along approach, its fingers opening as near to `opening` as that allows.

        Of the two that differ by half a turn the one nearer to the hand's present rotation.
        """
        approach = approach / np.linalg.norm(approach)
        opening = opening - approach * (opening @ approach)
        opening = opening / np.linalg.norm(opening)
        both = [np.stack([side, np.cross(approach, side), approach], axis=1) for side in (opening, -opening)]
        return min(both, key=lambda rotation: np.linalg.norm(turn_between(self.rotation, rotation)))

    def towards(self, position: np.ndarray, rotation: np.ndarray, gripper: float, speed: float = 1.0) -> np.ndarray:
        """The next action (7,) on the way to a pose: proportional to what remains, bounded in speed and acceleration."""
        move = limit(self.GAIN * (position - self.position) / self.POSITION_SCALE, speed)
        turn = limit(self.TURN_GAIN * turn_between(self.rotation, rotation) / self.ROTATION_SCALE, self.TURN_SPEED)
        move = self.last[:3] + limit(move - self.last[:3], self.ACCELERATION)
        turn = self.last[3:] + limit(turn - self.last[3:], self.ACCELERATION / 2)
        self.last = np.clip(np.concatenate([move, turn]), -1, 1)
        return np.append(self.last, gripper)


# ------------------------------------------------------------------------------------------------------------ primitives
def move_to(e: Expert, position, rotation, gripper, tolerance=0.025, turn_tolerance=np.inf, speed=1.0, patience=80) -> Actions:
    """Go straight to a pose until it is within tolerance (metres, radians), for at most `patience` steps."""
    for _ in range(patience):
        away, turn = position - e.position, turn_between(e.rotation, rotation)
        if np.linalg.norm(away) < tolerance and np.linalg.norm(turn) < turn_tolerance:
            return
        yield e.towards(position, rotation, gripper, speed)


def descend(e: Expert, position, rotation, tolerance=0.007, speed=0.8, patience=50) -> Actions:
    """Come down on a pose through a funnel: only as low as the hand is aligned, lest a finger lands on the object."""
    for _ in range(patience):
        aside = np.linalg.norm((position - e.position)[:2])
        turn = np.linalg.norm(turn_between(e.rotation, rotation))
        if aside < tolerance and turn < 0.08 and abs(e.position[2] - position[2]) < tolerance:
            return
        lowest = position[2] + 8 * max(0, aside - 0.006) + 0.15 * max(0, turn - 0.1)
        yield e.towards(np.append(position[:2], min(lowest, max(e.position[2], position[2]))), rotation, GRIPPER_OPEN, speed)


def grip(e: Expert, position, rotation, patience=12) -> Actions:
    """Close the fingers in place until they move no more."""
    for step in range(patience):
        gap = e.gap
        yield e.towards(position, rotation, GRIPPER_CLOSE)
        if step >= 4 and gap - e.gap < 0.0005:
            return


def pick_top(e: Expert, target: str, depth=0.024, yaws=YAWS, lift=0.06) -> Actions:
    """Grasp an object from above and lift it."""
    yield from take(e, target, *top_grasp(e.points(target), e.obstacles(target), depth, yaws), lift)


def pick_rim(e: Expert, target: str, goal=None, depth=0.026, angles=RIM, pitch=0, lift=0.06, slide=(0, 0, 0)) -> Actions:
    """Grasp a bowl, plate or mug over its rim and lift it; clear of what stands around it and around its goal.

    pitch: degrees that the hand leans over towards the robot; slide: metres that the object moves along the table before.
    """
    points, obstacles, middle = e.points(target), e.obstacles(target), e.spot(target)
    if goal:
        obstacles = np.concatenate([obstacles, obstacles - (e.spot(goal) - np.append(middle[:2], points[:, 2].min()))])
    position, rotation = rim_grasp(points, obstacles, middle, e.base, depth, angles)
    rotation = Rotation.from_euler("y", -pitch, degrees=True).as_matrix() @ rotation
    yield from take(e, target, position, rotation, lift, slide)


def take(e: Expert, target: str, position, rotation, lift, slide=(0, 0, 0)) -> Actions:
    """Come from above to a grasp, close the fingers, and lift."""
    if e.position[2] < position[2] + 0.06:
        yield from move_to(e, np.append(e.position[:2], position[2] + 0.10), rotation, GRIPPER_OPEN)
    yield from move_to(e, position + 0.08 * UP + e.jitter(), rotation, GRIPPER_OPEN, turn_tolerance=0.25)
    yield from descend(e, position, rotation)
    yield from grip(e, position, rotation)
    if any(slide):
        yield from move_to(e, e.position + slide, rotation, GRIPPER_CLOSE, tolerance=0.015, speed=0.6, patience=25)
    yield from lift_up(e, target, rotation, lift)


def lift_up(e: Expert, target: str, rotation, height=0.06) -> Actions:
    before = e.points(target)[:, 2].min()
    yield from move_to(e, e.position + height * UP, rotation, GRIPPER_CLOSE, patience=20)
    if e.points(target)[:, 2].min() < before + 0.02:
        raise MissedGrasp(target)


def drop_into(e: Expert, target: str, container: str, shift: tuple[float, float] = (0, 0)) -> Actions:
    """Carry the held object over a container, lower it below the rim, let go, and rise. shift: from its middle, in metres."""
    rotation, rim = e.rotation, e.points(container)[:, 2].max()
    middle = e.env.data.site(f"{container}_contain_region").xpos[:2] + shift
    height = rim + 0.03 + e.position[2] - e.points(target)[:, 2].min()  # of the hand, with the object just above the rim
    lifted = np.append(e.position[:2], max(height - 0.05, e.position[2] + 0.02)) + e.jitter()
    yield from move_to(e, lifted, rotation, GRIPPER_CLOSE, tolerance=0.04)
    offset = (e.points(target).max(0) + e.points(target).min(0))[:2] / 2 - e.position[:2]
    over = np.append(middle - offset, height) + e.jitter()
    yield from move_to(e, over, rotation, GRIPPER_CLOSE)
    inside = np.append(over[:2], max(over[2] - 0.09, rim + 0.015))  # the hand itself stays above the rim
    yield from move_to(e, inside, rotation, GRIPPER_CLOSE, tolerance=0.015, speed=0.8)
    yield from release(e, rotation)


def carried(e: Expert, target: str, goal, rotation) -> np.ndarray:
    """Where the hand must be, turned to rotation, for the held object's origin to be at goal."""
    return goal - rotation @ e.rotation.T @ (e.spot(target) - e.position)


def place(e: Expert, target: str, on: str, shift=(0, 0), up=0.10, opening=None, yaw_tolerance=np.inf) -> Actions:
    """Carry the held object `up` metres over a site or an object, lower it until it touches something, and let go.

    shift: from the middle, in metres; opening: the direction of the fingers, if the hand must turn.
    """
    rotation = e.rotation if opening is None else e.facing(-UP, np.array(opening, float))
    bottom = e.spot(target)[2] - e.points(target)[:, 2].min()
    goal = e.spot(on) + [*shift, bottom]
    rise = e.position + max(0, goal[2] + up - 0.02 - e.spot(target)[2]) * UP
    yield from move_to(e, rise + e.jitter(), e.rotation, GRIPPER_CLOSE, tolerance=0.04)
    over = carried(e, target, goal + up * UP, rotation)
    yield from move_to(e, over + e.jitter(), rotation, GRIPPER_CLOSE, turn_tolerance=0.3)
    over = carried(e, target, goal + up * UP, rotation)
    yield from move_to(e, over, rotation, GRIPPER_CLOSE, tolerance=0.012, patience=20)
    for _ in itertools.takewhile(lambda _: not e.touches(target), range(60)):
        below = carried(e, target, goal, rotation)
        yield e.towards(np.append(below[:2], e.position[2] - 0.04), rotation, GRIPPER_CLOSE, speed=0.6)
    yield from release(e, rotation)


def insert(e: Expert, target: str, site: str, path: list[tuple], pitch=0) -> Actions:
    """Bring the held object's origin through a path of points in the frame of a site (metres), and back out of it.

    pitch: degrees that the hand turns about the world's x axis on the way to the first point.
    """
    rotation = Rotation.from_euler("x", pitch, degrees=True).as_matrix() @ e.rotation
    frame, origin = e.env.data.site(site).xmat.reshape(3, 3), e.spot(site)
    for step, point in enumerate(path):
        goal = origin + frame @ point
        tolerance, speed = (0.03, 1.0) if step == 0 else (0.008, 0.5)
        for _ in range(90 if step == 0 else 45):
            position = carried(e, target, goal, rotation)
            if np.linalg.norm(position - e.position) < tolerance and np.linalg.norm(turn_between(e.rotation, rotation)) < 0.2:
                break
            yield e.towards(position, rotation, GRIPPER_CLOSE, speed)
    yield from release(e, rotation, away=-rotation[:, 2])


def release(e: Expert, rotation, away=UP) -> Actions:
    """Open the fingers in place until the object is free, then go away by 10 cm."""
    position, wide = e.position, min(e.gap + 0.02, 0.075)
    for _ in itertools.takewhile(lambda _: e.gap <= wide, range(8)):
        yield e.towards(position, rotation, GRIPPER_OPEN)
    yield from move_to(e, position + 0.10 * away, rotation, GRIPPER_OPEN, speed=0.7, patience=30)


def slide(e: Expert, target: str, to: str, radius=0.064, height=0.009) -> Actions:
    """Pinch the rim of a plate on the side of its goal, and slide it there over the table."""
    middle, goal, obstacles = e.spot(target), e.spot(to), e.obstacles(target)
    ahead = np.arctan2(*(goal - middle)[1::-1])

    def cost(turn):
        opening = np.array([np.cos(ahead + turn), np.sin(ahead + turn), 0])
        hits = collisions(obstacles, middle + radius * opening + height * UP, opening, np.cross(UP, opening))
        return hits + 0.5 * abs(turn)

    phi = ahead + min(np.deg2rad([0, 15, -15, 30, -30, 45, -45, 60, -60]), key=cost)
    opening = np.array([np.cos(phi), np.sin(phi), 0])
    position, rotation = middle + radius * opening + height * UP, e.facing(-UP, opening)
    yield from move_to(e, position + 0.08 * UP + e.jitter(), rotation, GRIPPER_OPEN, turn_tolerance=0.25)
    yield from descend(e, position, rotation)
    yield from grip(e, position, rotation)
    for _ in range(90):
        way = (goal - e.spot(target))[:2]
        if np.linalg.norm(way) < 0.012:
            break
        yield e.towards(np.append(e.position[:2] + way, position[2] + 0.004), rotation, GRIPPER_CLOSE, speed=0.5)
    yield from release(e, rotation)


def follow(e: Expert, joint: str, to: float, rotation, at=None, lead=0.05, turns=True, patience=100) -> Actions:
    """Move a joint to a coordinate (metres or radians), with the closed hand fixed to what it moves.

    at: where on it the hand shall be, if not where it is now; lead: how far ahead of the joint the hand aims;
    turns: whether the hand turns with it.
    """
    model, data, j = e.env.model, e.env.data, e.env.model.joint(joint).id
    body, sign = model.jnt_bodyid[j], np.sign(to - data.joint(joint).qpos[0])
    frame = data.xmat[body].reshape(3, 3)  # views: they move with the body
    here, held = frame.T @ ((e.position if at is None else at) - data.xpos[body]), frame.T @ rotation
    for _ in itertools.takewhile(lambda _: sign * (to - data.joint(joint).qpos[0]) > 0, range(patience)):
        position, axis = data.xpos[body] + frame @ here, sign * lead * data.xaxis[j]
        if model.jnt_type[j] == SLIDE:
            yield e.towards(position + axis, rotation, GRIPPER_CLOSE, speed=0.6)
        else:
            ahead = Rotation.from_rotvec(axis).as_matrix()
            position = data.xanchor[j] + ahead @ (position - data.xanchor[j])
            yield e.towards(position, ahead @ frame @ held if turns else rotation, GRIPPER_CLOSE, speed=0.6)


def seize(e: Expert, bar, out, opening, tilt: float, past: float) -> np.ndarray:
    """Grasp a bar or handle that sticks out along `out`, the hand tilted by so many degrees from straight down; its rotation."""
    approach = -np.sin(np.deg2rad(tilt)) * out - np.cos(np.deg2rad(tilt)) * UP
    rotation = e.facing(approach, opening)
    yield from move_to(e, bar - 0.10 * approach + 0.03 * out + 0.10 * UP + e.jitter(), rotation, GRIPPER_OPEN, 0.05, 0.5)
    yield from move_to(e, bar - 0.09 * approach, rotation, GRIPPER_OPEN, 0.015, 0.12)
    yield from move_to(e, bar + past * approach, rotation, GRIPPER_OPEN, 0.007, 0.15, speed=0.6, patience=30)
    yield from grip(e, bar + past * approach, rotation)
    return rotation


def pull_open(e: Expert, joint: str, to: float, tilt: float) -> Actions:
    """Open a drawer by its bar, which the fingers hold from above and below."""
    bar, out = e.handle(joint)
    rotation = yield from seize(e, bar, out, UP, tilt, past=0.012)
    yield from follow(e, joint, to, rotation)
    yield from release(e, rotation, away=-rotation[:, 2])


def push_shut(e: Expert, joint: str, tilt: float, lead=0.05) -> Actions:
    """Close a drawer or a door with the fist against its handle."""
    bar, out = e.handle(joint)
    approach = -np.sin(np.deg2rad(tilt)) * out - np.cos(np.deg2rad(tilt)) * UP
    rotation, before = e.facing(approach, np.cross(UP, out)), bar + 0.07 * out + 0.02 * UP
    top = max(e.position[2], bar[2] + 0.25)
    yield from move_to(e, np.append(e.position[:2], top), e.rotation, GRIPPER_CLOSE, 0.04)
    yield from move_to(e, np.append(before[:2], top) + e.jitter(), rotation, GRIPPER_CLOSE, 0.04, 0.4)
    yield from move_to(e, before, rotation, GRIPPER_CLOSE, 0.02, 0.15)
    yield from follow(e, joint, 0.0, rotation, bar + 0.01 * out, lead, turns=False)
    yield from move_to(e, e.position + 0.06 * out, rotation, GRIPPER_CLOSE, patience=12)


def turn_knob(e: Expert, joint: str, to=0.9) -> Actions:
    """Grasp the ridge of a knob from above and turn it (radians)."""
    model, data, j = e.env.model, e.env.data, e.env.model.joint(joint).id
    body = model.jnt_bodyid[j]
    across, along = data.xmat[body].reshape(3, 3).T[:2]  # of the ridge
    top = e._points(np.arange(model.nbody), [body])[:, 2].max()
    position, rotation = np.append(data.xanchor[j][:2], top - 0.012) + 0.005 * along, e.facing(-UP, across)
    yield from move_to(e, position + 0.08 * UP + e.jitter(), rotation, GRIPPER_OPEN, turn_tolerance=0.25)
    yield from descend(e, position, rotation)
    yield from grip(e, position, rotation)
    yield from follow(e, joint, to, rotation, lead=0.6)
    yield from release(e, e.rotation)


def pick_handle(e: Expert, target: str, tilt=45, lift=0.07) -> Actions:
    """Grasp a mug by its handle, the hand leaning away from it, and lift it."""
    points, middle = e.points(target), e.spot(target)
    radius = np.linalg.norm((points - middle)[:, :2], axis=1)
    bar = points[radius > radius.max() - 0.018]
    bar = (bar.max(0) + bar.min(0)) / 2
    out = (bar - middle) * [1, 1, 0] / np.linalg.norm((bar - middle)[:2])
    rotation = yield from seize(e, bar, out, np.cross(UP, out), tilt, past=0.004)
    yield from lift_up(e, target, rotation, lift)


# ----------------------------------------------------------------------------------------------------------------- tasks
def into_basket(name: str, shift: tuple[float, float] = (0, 0), **grasp) -> list[tuple]:
    return [(pick_top, {"target": name, **grasp}), (drop_into, {"target": name, "container": "basket_1", "shift": shift})]


LIBERO_OBJECT = [
    *map(into_basket, ("alphabet_soup_1", "cream_cheese_1", "salad_dressing_1", "bbq_sauce_1", "ketchup_1")),
    *map(into_basket, ("tomato_sauce_1", "butter_1")),
    into_basket("milk_1", depth=0.030),  # any higher, and the gable of a carton wedges the fingers
    into_basket("chocolate_pudding_1"),
    into_basket("orange_juice_1", depth=0.030, yaws=range(70, 115, 5)),  # across the roof, whose ends hook on open fingers
]

BOWL, MUG, YELLOW_MUG, BOTTLE = "akita_black_bowl_1", "porcelain_mug_1", "white_yellow_mug_1", "wine_bottle_1"
CABINET, STOVE = "wooden_cabinet_1", "flat_stove_1_cook_region"


def bowl(on: str, lift=0.06, **where) -> list[tuple]:
    return [(pick_rim, {"target": BOWL, "goal": on, "lift": lift}), (place, {"target": BOWL, "on": on, **where})]


LIBERO_SPATIAL = [bowl("plate_1", lift=0.14 if task == 4 else 0.06) for task in range(10)]  # 4: out of a drawer

LIBERO_GOAL = [
    [(pull_open, {"joint": f"{CABINET}_middle_level", "to": -0.15, "tilt": 80})],
    bowl(STOVE),
    [
        (pick_top, {"target": BOTTLE, "depth": 0.030}),
        (place, {"target": BOTTLE, "on": f"{CABINET}_top_side", "shift": (0, 0.03)}),
    ],
    [
        (pull_open, {"joint": f"{CABINET}_top_level", "to": -0.133, "tilt": 70}),
        (pick_rim, {"target": BOWL, "depth": 0.024, "angles": [180], "pitch": 30, "lift": 0.12, "slide": (-0.09, 0.02, 0.012)}),
        (place, {"target": BOWL, "on": f"{CABINET}_top_region", "shift": (0.012, 0.012)}),
    ],
    bowl(f"{CABINET}_top_side", shift=(0, 0.02)),
    [(slide, {"target": "plate_1", "to": "main_table_stove_front_region"})],
    [(pick_top, {"target": "cream_cheese_1", "depth": 0.012}), (place, {"target": "cream_cheese_1", "on": BOWL})],
    [(turn_knob, {"joint": "flat_stove_1_button"})],
    bowl("plate_1"),
    [
        (pick_top, {"target": BOTTLE, "depth": 0.035, "yaws": [90], "lift": 0.15}),
        (
            insert,
            {
                "target": BOTTLE,
                "site": "wine_rack_1_top_region",
                "pitch": 60,
                "path": [(0, -0.10, 0.05), (0, -0.06, 0.04), (0, -0.03, 0.03), (0, -0.018, 0.02), (0, -0.012, 0.012)],
            },
        ),
    ],
]


def both_into_basket(first, second):
    return into_basket(first, shift=(0.03, 0)) + into_basket(second, shift=(-0.03, 0))


def moka(number: int, shift=(0, 0)):
    name = f"moka_pot_{number}"
    return [(pick_top, {"target": name, "depth": 0.030}), (place, {"target": name, "on": STOVE, "shift": shift})]


def mug(name, plate):
    return [(pick_rim, {"target": name, "depth": 0.025}), (place, {"target": name, "on": plate})]


LIBERO_10 = [
    both_into_basket("alphabet_soup_1", "tomato_sauce_1"),
    both_into_basket("cream_cheese_1", "butter_1"),
    [(turn_knob, {"joint": "flat_stove_1_button"}), *moka(1)],
    bowl("white_cabinet_1_bottom_region", up=0.13) + [(push_shut, {"joint": "white_cabinet_1_bottom_level", "tilt": 50})],
    mug(MUG, "plate_1") + mug(YELLOW_MUG, "plate_2"),
    [
        (pick_top, {"target": "black_book_1", "depth": 0.030, "lift": 0.10}),
        (place, {"target": "black_book_1", "on": "desk_caddy_1_back_contain_region", "opening": (1, 0, 0), "up": 0.08}),
    ],
    mug(MUG, "plate_1")
    + [
        (pick_top, {"target": "chocolate_pudding_1", "depth": 0.016}),
        (place, {"target": "chocolate_pudding_1", "on": "living_room_table_plate_right_region", "shift": (0, 0.01)}),
    ],
    both_into_basket("alphabet_soup_1", "cream_cheese_1"),
    moka(2, (0.045, 0)) + moka(1, (-0.045, 0)),
    [
        (pick_handle, {"target": YELLOW_MUG}),
        (
            insert,
            {
                "target": YELLOW_MUG,
                "site": "microwave_1_heating_region",
                "path": [(-0.035, -0.197, -0.042), (-0.035, -0.197, -0.052), (-0.035, 0.0, -0.054), (-0.035, -0.01, -0.075)],
            },
        ),
        (push_shut, {"joint": "microwave_1_microjoint", "tilt": 0, "lead": 0.4}),
    ],
]
SUITES = {"libero_object": LIBERO_OBJECT, "libero_spatial": LIBERO_SPATIAL, "libero_goal": LIBERO_GOAL, "libero_10": LIBERO_10}
TASKS = {(suite, task): steps for suite, rows in SUITES.items() for task, steps in enumerate(rows)}
