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
from grasps import RIM, TOP_DOWN, UP, YAWS, collisions, limit, rim_grasp, surface_points, top_grasp, turn_between

Actions = Iterator[np.ndarray]
SLIDE = 2  # mujoco's mjJNT_SLIDE
SUPPORTS = {"floor", "main_table", "kitchen_table", "living_room_table", "study_table", "coffee_table"}


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

    def root(self, name: str) -> int:
        """The body that carries an object or a fixture."""
        return self.env.model.body((self.env.env.objects_dict | self.env.env.fixtures_dict)[name].root_body).id

    def spot(self, name: str) -> np.ndarray:
        """Where something is, (3,): the origin of an object or fixture, or a site (LIBERO's regions)."""
        known = name in self.env.env.objects_dict or name in self.env.env.fixtures_dict
        return (self.env.data.xpos[self.root(name)] if known else self.env.data.site(name).xpos).copy()

    def points(self, *names: str) -> np.ndarray:
        """Points (N, 3) on the collision geometry of objects and fixtures."""
        trees = self.env.model.body_rootid
        return self.body_points(np.isin(trees, [trees[self.root(name)] for name in names]))

    def body_points(self, chosen: np.ndarray) -> np.ndarray:
        """The same of the bodies that are chosen, (nbody,) bool."""
        model = self.env.model
        solid = (model.geom_contype | model.geom_conaffinity) > 0
        return surface_points(model, self.env.data, np.flatnonzero(solid & chosen[model.geom_bodyid]))

    def obstacles(self, target: str) -> np.ndarray:
        return self.points(*sorted({*self.env.env.objects_dict, *self.env.env.fixtures_dict} - SUPPORTS - {target}))

    def touches(self, name: str) -> bool:
        """Whether an object touches anything but the robot."""
        model = self.env.model
        trees = model.body_rootid[model.geom_bodyid[self.env.data.contact.geom]]  # (contacts, 2)
        target, robot = (model.body_rootid[body] for body in (self.root(name), model.site_bodyid[self.env.robot.eef_site_id]))
        return bool(((trees == target).any(axis=1) & (trees != robot).all(axis=1)).any())

    def handle(self, joint: str) -> tuple[np.ndarray, np.ndarray]:
        """Of what a joint moves: the part that sticks out most towards opening, (3,), and that direction, (3,).

        LIBERO's drawers and doors are closed at 0 and open at negative coordinates.
        """
        model, data, j = self.env.model, self.env.data, self.env.model.joint(joint).id
        points = self.body_points(np.arange(model.nbody) == model.jnt_bodyid[j])
        arm = points.mean(0) - data.xanchor[j]
        out = -data.xaxis[j] if model.jnt_type[j] == SLIDE else -np.cross(data.xaxis[j], arm)
        out = out / np.linalg.norm(out)
        bar = points[points @ out > (points @ out).max() - 0.016]
        return (bar.max(0) + bar.min(0)) / 2, out

    def facing(self, approach: np.ndarray, opening: np.ndarray) -> np.ndarray:
        """Rotation (3, 3) of a hand that points along approach, its fingers opening as near to `opening` as that allows.

        Of the two that differ by half a turn the one nearer to the hand's present rotation and to its first: the last joint
        does not turn all the way round.
        """
        approach = approach / np.linalg.norm(approach)
        opening = opening - approach * (opening @ approach)
        opening = opening / np.linalg.norm(opening)
        both = [np.stack([side, np.cross(approach, side), approach], axis=1) for side in (opening, -opening)]
        return min(both, key=lambda to: sum(np.linalg.norm(turn_between(a, to)) for a in (self.rotation, TOP_DOWN)))

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


def grasp_from_above(e: Expert, position, rotation, above=0.08) -> Actions:
    """Come down on a grasp from so many metres above, and close the fingers."""
    yield from move_to(e, position + above * UP + e.jitter(), rotation, GRIPPER_OPEN, turn_tolerance=0.25)
    yield from descend(e, position, rotation)
    yield from grip(e, position, rotation)


def pick_top(e: Expert, target: str, depth=0.024, yaws=YAWS, lift=0.06, above=0.08) -> Actions:
    """Grasp an object from above and lift it; above: how high over the grasp to arrive, higher than what stands around it."""
    yield from take(e, target, *top_grasp(e.points(target), e.obstacles(target), depth, yaws), lift, above=above)


def pick_rim(
    e: Expert, target: str, goal=None, depth=0.026, angles=RIM, pitch=0, lift=0.06, drag=(0, 0, 0), above=0.08
) -> Actions:
    """Grasp a bowl, plate or mug over its rim and lift it; clear of what stands around it and around its goal.

    pitch: degrees that the hand leans over towards the robot; drag: metres that the object moves along the table before;
    above: how high over the grasp to arrive, already turned.
    """
    points, obstacles, middle = e.points(target), e.obstacles(target), e.spot(target)
    if goal:
        obstacles = np.concatenate([obstacles, obstacles - (e.spot(goal) - np.append(middle[:2], points[:, 2].min()))])
    position, rotation = rim_grasp(points, obstacles, middle, e.base, depth, angles)
    rotation = Rotation.from_euler("y", -pitch, degrees=True).as_matrix() @ rotation
    yield from take(e, target, position, rotation, lift, drag, above)


def take(e: Expert, target: str, position, rotation, lift, drag=(0, 0, 0), above=0.08) -> Actions:
    """Come from above to a grasp, close the fingers, and lift."""
    if e.position[2] < position[2] + 0.06:
        yield from move_to(e, np.append(e.position[:2], position[2] + 0.10), rotation, GRIPPER_OPEN)
    yield from grasp_from_above(e, position, rotation, above)
    if any(drag):
        yield from move_to(e, e.position + drag, rotation, GRIPPER_CLOSE, tolerance=0.015, speed=0.6, patience=25)
    yield from lift_up(e, target, rotation, lift)


def lift_up(e: Expert, target: str, rotation, height=0.06) -> Actions:
    before = e.points(target)[:, 2].min()
    yield from move_to(e, e.position + height * UP, rotation, GRIPPER_CLOSE, patience=20)
    if e.points(target)[:, 2].min() < before + 0.02:
        raise MissedGrasp(target)


def drop_into(e: Expert, target: str, container: str, shift: tuple[float, float] = (0, 0), rise=0) -> Actions:
    """Carry the held object over a container, lower it below the rim, let go, and rise.

    shift: from its middle, in metres; rise: how much higher to carry it, over what stands in the way.
    """
    rotation, rim = e.rotation, e.points(container)[:, 2].max()
    middle = e.env.data.site(f"{container}_contain_region").xpos[:2] + shift
    height = rim + 0.03 + e.position[2] - e.points(target)[:, 2].min() + rise  # of the hand, the object just above the rim
    lifted = np.append(e.position[:2], max(height - 0.05, e.position[2] + 0.02)) + e.jitter()
    yield from move_to(e, lifted, rotation, GRIPPER_CLOSE, tolerance=0.04)
    offset = (e.points(target).max(0) + e.points(target).min(0))[:2] / 2 - e.position[:2]
    over = np.append(middle - offset, height) + e.jitter()
    yield from move_to(e, over, rotation, GRIPPER_CLOSE)
    inside = np.append(over[:2], max(over[2] - 0.09 - rise, rim + 0.015))  # the hand itself stays above the rim
    yield from move_to(e, inside, rotation, GRIPPER_CLOSE, tolerance=0.015, speed=0.8)
    yield from release(e, rotation)


def carried(e: Expert, target: str, goal, rotation) -> np.ndarray:
    """Where the hand must be, turned to rotation, for the held object's origin to be at goal."""
    return goal - rotation @ e.rotation.T @ (e.spot(target) - e.position)


def place(e: Expert, target: str, on: str, shift=(0, 0), up=0.10, down=None, opening=None) -> Actions:
    """Carry the held object `up` metres over a site or an object, lower it until it touches something, and let go.

    shift: from the middle, in metres; down: lower it to this height over the spot, whatever it touches;
    opening: the direction of the fingers, if the hand must turn.
    """
    rotation = e.rotation if opening is None else e.facing(-UP, np.array(opening, float))
    points, origin = e.points(target), e.spot(target)
    goal = e.spot(on) + [*shift, origin[2] - points[:, 2].min()]  # of the object's origin
    if down is not None:  # between walls it is the middle that counts
        goal[:2] -= (rotation @ e.rotation.T @ ((points.max(0) + points.min(0)) / 2 - origin))[:2]
    rise = e.position + max(0, goal[2] + up - 0.02 - e.spot(target)[2]) * UP
    yield from move_to(e, rise + e.jitter(), e.rotation, GRIPPER_CLOSE, tolerance=0.04)
    over = carried(e, target, goal + up * UP, rotation)
    yield from move_to(e, over + e.jitter(), rotation, GRIPPER_CLOSE, turn_tolerance=0.3)
    over = carried(e, target, goal + up * UP, rotation)
    yield from move_to(e, over, rotation, GRIPPER_CLOSE, tolerance=0.012, patience=20)
    for _ in range(60):
        if e.touches(target) if down is None else e.spot(target)[2] < goal[2] + down:
            break
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
    yield from grasp_from_above(e, position, rotation)
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
    top = e.body_points(np.arange(model.nbody) == body)[:, 2].max()
    position, rotation = np.append(data.xanchor[j][:2], top - 0.012) + 0.005 * along, e.facing(-UP, across)
    yield from grasp_from_above(e, position, rotation)
    yield from follow(e, joint, to, rotation, lead=0.6)
    yield from release(e, e.rotation)


def pick_handle(e: Expert, target: str, tilt=45, lift=0.07) -> Actions:
    """Grasp a mug by its handle, the hand leaning away from it, and lift it."""
    points = e.points(target)
    offset = (points - e.spot(target))[:, :2]

    def extent(angle):
        """(N,) along that direction, and the width of the outermost 12 mm across it: a handle is far out and narrow."""
        along, across = offset @ [np.cos(angle), np.sin(angle)], offset @ [-np.sin(angle), np.cos(angle)]
        return along, np.ptp(across[along > along.max() - 0.012])

    angle = min(np.deg2rad(range(0, 360, 5)), key=lambda angle: extent(angle)[1] - 0.5 * extent(angle)[0].max())
    along, out = extent(angle)[0], np.array([np.cos(angle), np.sin(angle), 0])
    bar = points[along > along.max() - 0.018].mean(0)
    rotation = yield from seize(e, bar, out, np.cross(UP, out), tilt, past=0.004)
    yield from lift_up(e, target, rotation, lift)


# ----------------------------------------------------------------------------------------------------------------- tasks
BOWL, MUG, YELLOW_MUG, BOTTLE = "akita_black_bowl_1", "porcelain_mug_1", "white_yellow_mug_1", "wine_bottle_1"
BURNER, KNOB, CABINET = "flat_stove_1_cook_region", "flat_stove_1_button", "wooden_cabinet_1"
UP_THE_RACK = [(0, -0.10, 0.05), (0, -0.06, 0.04), (0, -0.03, 0.03), (0, -0.018, 0.02), (0, -0.012, 0.012)]
INTO_MICROWAVE = [(-0.035, -0.197, -0.042), (-0.035, -0.197, -0.052), (-0.035, 0, -0.054), (-0.035, -0.01, -0.075)]


def do(primitive, **parameters) -> tuple:
    return primitive, parameters


def into_basket(name: str, shift: tuple[float, float] = (0, 0), rise=0, **grasp) -> list[tuple]:
    return [do(pick_top, target=name, **grasp), do(drop_into, target=name, container="basket_1", shift=shift, rise=rise)]


def both_into_basket(first: str, second: str) -> list[tuple]:
    high = {"above": 0.18, "rise": 0.08}  # over the cartons, which fall when they are touched
    return into_basket(first, shift=(0.03, 0), **high) + into_basket(second, shift=(-0.03, 0), **high)


def bowl(on: str, lift=0.06, depth=0.026, **where) -> list[tuple]:
    return [do(pick_rim, target=BOWL, goal=on, depth=depth, lift=lift), do(place, target=BOWL, on=on, **where)]


def mug(name: str, plate: str) -> list[tuple]:
    return [do(pick_rim, target=name, depth=0.025), do(place, target=name, on=plate)]


def moka(name: str, shift=(0, 0)) -> list[tuple]:
    return [do(pick_top, target=name, depth=0.030), do(place, target=name, on=BURNER, shift=shift)]


SUITES = {
    "libero_object": [
        *map(into_basket, ("alphabet_soup_1", "cream_cheese_1", "salad_dressing_1", "bbq_sauce_1", "ketchup_1")),
        *map(into_basket, ("tomato_sauce_1", "butter_1")),
        into_basket("milk_1", depth=0.030),  # any higher, and the gable of a carton wedges the fingers
        into_basket("chocolate_pudding_1"),
        into_basket("orange_juice_1", depth=0.030, yaws=range(70, 115, 5)),  # across the roof, whose ends hook on open fingers
    ],
    "libero_spatial": [
        *4 * [bowl("plate_1")],
        bowl("plate_1", lift=0.14, depth=0.018),  # out of a drawer: nearer to the rim than elsewhere
        *5 * [bowl("plate_1")],
    ],
    "libero_goal": [
        [do(pull_open, joint=f"{CABINET}_middle_level", to=-0.15, tilt=80)],
        bowl(BURNER),
        [do(pick_top, target=BOTTLE, depth=0.030), do(place, target=BOTTLE, on=f"{CABINET}_top_side", shift=(0, 0.03))],
        [
            do(pull_open, joint=f"{CABINET}_top_level", to=-0.133, tilt=70),
            # the open drawer hangs over the bowl: turn above it, grasp on the robot's side, draw the bowl out before lifting it
            do(pick_rim, target=BOWL, depth=0.024, angles=[180], pitch=30, lift=0.12, drag=(-0.09, 0.02, 0.012), above=0.2),
            do(place, target=BOWL, on=f"{CABINET}_top_region", shift=(0.012, 0.012)),
        ],
        bowl(f"{CABINET}_top_side", shift=(0, 0.02)),
        [do(slide, target="plate_1", to="main_table_stove_front_region")],
        [do(pick_top, target="cream_cheese_1", depth=0.012), do(place, target="cream_cheese_1", on=BOWL)],
        [do(turn_knob, joint=KNOB)],
        bowl("plate_1"),
        [
            do(pick_top, target=BOTTLE, depth=0.035, yaws=[90], lift=0.15),
            do(insert, target=BOTTLE, site="wine_rack_1_top_region", pitch=60, path=UP_THE_RACK),
        ],
    ],
    "libero_10": [
        both_into_basket("alphabet_soup_1", "tomato_sauce_1"),
        both_into_basket("cream_cheese_1", "butter_1"),
        [do(turn_knob, joint=KNOB), *moka("moka_pot_1")],
        bowl("white_cabinet_1_bottom_region", up=0.13) + [do(push_shut, joint="white_cabinet_1_bottom_level", tilt=50)],
        mug(MUG, "plate_1") + mug(YELLOW_MUG, "plate_2"),
        [
            do(pick_top, target="black_book_1", depth=0.030, lift=0.10),
            do(place, target="black_book_1", on="desk_caddy_1_back_contain_region", opening=(1, 0, 0), down=-0.05),
        ],
        [
            *mug(MUG, "plate_1"),
            do(pick_top, target="chocolate_pudding_1", depth=0.016),
            do(place, target="chocolate_pudding_1", on="living_room_table_plate_right_region", shift=(0, 0.01)),
        ],
        both_into_basket("alphabet_soup_1", "cream_cheese_1"),
        moka("moka_pot_2", shift=(0.045, 0)) + moka("moka_pot_1", shift=(-0.045, 0)),
        [
            do(pick_handle, target=YELLOW_MUG),
            do(insert, target=YELLOW_MUG, site="microwave_1_heating_region", path=INTO_MICROWAVE),
            do(push_shut, joint="microwave_1_microjoint", tilt=0, lead=0.4),
        ],
    ],
}
TASKS = {(suite, task): steps for suite, rows in SUITES.items() for task, steps in enumerate(rows)}
