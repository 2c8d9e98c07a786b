"""The scripted expert that stage 00 records: how it sees, grasps and moves, and what it does in each task.

It reads the simulator's state (poses and collision geometry) and acts through the same 7 numbers as every
policy: delta position, delta rotation, gripper. A task is a row of TASKS: a list of primitives with their
parameters. A primitive is a generator of actions. Its caller may disturb the actions, record them, or stop
when the task is solved. All primitives share one law of motion (Expert.towards), look at the scene when they
begin, and do not try again: a missed grasp ends the attempt.
"""

from collections.abc import Generator
from functools import partial

import numpy as np
from scipy.spatial.transform import Rotation

from common import GRIPPER_CLOSE, GRIPPER_OPEN, LAYOUTS, MAX_STEPS
from sim.env import TaskEnv, init_state_array
from sim.grasps import (
    RIM,
    TOP_DOWN,
    UP,
    YAWS,
    collisions,
    limit,
    rim_grasp,
    surface_points,
    top_grasp,
    turn_between,
)

Actions = Generator[np.ndarray, None, None]
SLIDE = 2  # mujoco's mjJNT_SLIDE
SUPPORTS = {"floor", "main_table", "kitchen_table", "living_room_table", "study_table", "coffee_table"}


# ----------------------------------------------------------------------------------------------------- expert
class MissedGrasp(Exception):
    """The object did not come along when the hand was lifted."""


class Expert:
    """What the primitives know about the scene, and the law of motion that they share."""

    ACCELERATION = 0.35  # bound on the change of the translation between two actions

    def __init__(self, env: TaskEnv, rng: np.random.Generator, waypoint_jitter: float):
        self.model, self.data, self.robot = env.model, env.data, env.robot
        self.things = env.env.objects_dict | env.env.fixtures_dict
        self.last = np.zeros(6)  # the last action without noise, without the gripper
        self.jitter = lambda: rng.uniform(-1, 1, 3) * waypoint_jitter  # of one waypoint, metres

    # of the hand: (3,) and (3, 3); metres between its fingers, whose coordinates run from -0.04 to 0.04
    position = property(lambda self: self.data.site_xpos[self.robot.eef_site_id].copy())
    rotation = property(lambda self: self.data.site_xmat[self.robot.eef_site_id].reshape(3, 3).copy())
    gap = property(lambda self: np.ptp(self.data.qpos[self.robot._ref_gripper_joint_pos_indexes]))

    def near(self, position, rotation, tolerance: float, turn_tolerance: float) -> bool:
        """Whether the hand is within the tolerances (metres, radians) of a pose."""
        return (
            np.linalg.norm(position - self.position) < tolerance
            and np.linalg.norm(turn_between(self.rotation, rotation)) < turn_tolerance
        )

    def root(self, name: str) -> int:
        """The body that carries an object or a fixture."""
        return self.model.body(self.things[name].root_body).id

    def spot(self, name: str) -> np.ndarray:
        """The position (3,) of an object or fixture (its origin) or of a site (LIBERO's regions)."""
        return (self.data.body(self.root(name)) if name in self.things else self.data.site(name)).xpos.copy()

    def points(self, *names: str) -> np.ndarray:
        """Points (N, 3) on the collision geometry of objects and fixtures."""
        trees = self.model.body_rootid
        return self.body_points(np.isin(trees, [trees[self.root(name)] for name in names]).nonzero()[0])

    def body_points(self, bodies: np.ndarray) -> np.ndarray:
        """Points (N, 3) on the collision geometry of bodies, given by their numbers."""
        solid = (self.model.geom_contype | self.model.geom_conaffinity) > 0
        geoms = np.flatnonzero(solid & np.isin(self.model.geom_bodyid, bodies))
        return surface_points(self.model, self.data, geoms)

    def obstacles(self, target: str) -> np.ndarray:
        """Points (N, 3) on everything that a hand at `target` may hit: no table, no floor."""
        return self.points(*sorted({*self.things} - SUPPORTS - {target}))

    def touches(self, name: str) -> bool:
        """Whether an object touches anything but the robot."""
        roots = self.model.body_rootid
        trees = roots[self.model.geom_bodyid[self.data.contact.geom]]  # (contacts, 2)
        involved = (trees == roots[self.root(name)]).any(axis=1)
        robot = roots[self.model.site_bodyid[self.robot.eef_site_id]]
        return bool((involved & (trees != robot).all(axis=1)).any())

    def handle(self, joint: str) -> tuple[np.ndarray, np.ndarray]:
        """The handle (3,) of a drawer or door, and the direction (3,) in which it opens.

        The handle is what sticks out most in that direction. LIBERO's drawers and doors are closed at
        coordinate 0 and open at negative ones.
        """
        kind, now = self.model.joint(joint), self.data.joint(joint)
        points = self.body_points(kind.bodyid)
        out = -now.xaxis if kind.type == SLIDE else -np.cross(now.xaxis, points.mean(0) - now.xanchor)
        out = out / np.linalg.norm(out)
        bar = points[points @ out > (points @ out).max() - 0.016]
        return (bar.max(0) + bar.min(0)) / 2, out

    def facing(self, approach: np.ndarray, opening: np.ndarray) -> np.ndarray:
        """Rotation (3, 3) of a hand that points along `approach` and opens nearly along `opening`.

        Two such rotations differ by half a turn. The one nearer to the hand's present and first rotation is
        taken, since the last joint cannot turn all the way round.
        """
        approach = approach / np.linalg.norm(approach)
        opening = opening - approach * (opening @ approach)
        opening = opening / np.linalg.norm(opening)
        both = [np.stack([side, np.cross(approach, side), approach], axis=1) for side in (opening, -opening)]
        present_and_first = (self.rotation, TOP_DOWN)
        return min(both, key=lambda to: sum(np.linalg.norm(turn_between(a, to)) for a in present_and_first))

    def towards(self, position, rotation, gripper: float, speed: float = 1.0) -> np.ndarray:
        """The next action (7,) on the way to a pose.

        Proportional to the remaining way, with bounds on speed and acceleration. For an action of 1, OSC_POSE
        moves its goal by 0.05 m or turns it by 0.5 rad.
        """
        move = limit(1.3 * (position - self.position) / 0.05, speed)
        turn = limit(1.4 * turn_between(self.rotation, rotation) / 0.5, 0.5)
        move = self.last[:3] + limit(move - self.last[:3], self.ACCELERATION)
        turn = self.last[3:] + limit(turn - self.last[3:], self.ACCELERATION / 2)
        self.last = np.clip(np.concatenate([move, turn]), -1, 1)
        return np.append(self.last, gripper)


# ------------------------------------------------------------------------------------------------- primitives
def move_to(
    e: Expert, position, rotation, gripper, tolerance=0.025, turn_tolerance=np.inf, speed=1.0, patience=80
) -> Actions:
    """Go straight to a pose until it is within tolerance (metres, radians), for at most `patience` steps."""
    for _ in range(patience):
        if e.near(position, rotation, tolerance, turn_tolerance):
            return
        yield e.towards(position, rotation, gripper, speed)


def descend(e: Expert, position, rotation, tolerance=0.007, speed=0.8, patience=50) -> Actions:
    """Come down on a pose through a funnel: the better the hand is aligned, the lower it may go.

    So no finger lands on the object.
    """
    for _ in range(patience):
        aside = np.linalg.norm((position - e.position)[:2])
        turn = np.linalg.norm(turn_between(e.rotation, rotation))
        if aside < tolerance and turn < 0.08 and abs(e.position[2] - position[2]) < tolerance:
            return
        lowest = position[2] + 8 * max(0, aside - 0.006) + 0.15 * max(0, turn - 0.1)
        below = np.append(position[:2], min(lowest, max(e.position[2], position[2])))
        yield e.towards(below, rotation, GRIPPER_OPEN, speed)


def grip(e: Expert, position, rotation, patience=12) -> Actions:
    """Close the fingers in place until they no longer move."""
    for step in range(patience):
        gap = e.gap
        yield e.towards(position, rotation, GRIPPER_CLOSE)
        if step >= 4 and gap - e.gap < 0.0005:
            return


def grasp_from_above(e: Expert, position, rotation, above=0.08) -> Actions:
    """Arrive `above` metres over a grasp, come down, and close the fingers."""
    yield from move_to(e, position + above * UP + e.jitter(), rotation, GRIPPER_OPEN, turn_tolerance=0.25)
    yield from descend(e, position, rotation)
    yield from grip(e, position, rotation)


def pick_top(e: Expert, target: str, depth=0.024, yaws=YAWS, lift=0.06, above=0.08) -> Actions:
    """Grasp an object from above and lift it. `above` must clear what stands around it."""
    pose = top_grasp(e.points(target), e.obstacles(target), depth, yaws)
    yield from take(e, target, *pose, lift, above=above)


def pick_rim(
    e: Expert, target: str, goal=None, depth=0.026, angles=RIM, pitch=0, lift=0.06, drag=None, above=0.08
) -> Actions:
    """Grasp a bowl, plate or mug over its rim and lift it, clear of its neighbours and of those of `goal`.

    pitch: degrees by which the hand leans towards the robot; drag: metres (3,) by which the hand moves the
    object before lifting it; above: height over the grasp at which the hand arrives, already turned.
    """
    points, obstacles, middle = e.points(target), e.obstacles(target), e.spot(target)
    if goal:  # the goal's neighbours too, moved to where they would be around the object
        way = e.spot(goal) - np.append(middle[:2], points[:, 2].min())
        obstacles = np.concatenate([obstacles, obstacles - way])
    base = e.data.body(e.robot.robot_model.root_body).xpos
    position, rotation = rim_grasp(points, obstacles, middle, base, depth, angles)
    rotation = Rotation.from_euler("y", -pitch, degrees=True).as_matrix() @ rotation
    yield from take(e, target, position, rotation, lift, drag, above)


def take(e: Expert, target: str, position, rotation, lift, drag=None, above=0.08) -> Actions:
    """Come to a grasp from above, close the fingers, and lift."""
    if e.position[2] < position[2] + 0.06:
        yield from move_to(e, np.append(e.position[:2], position[2] + 0.10), rotation, GRIPPER_OPEN)
    yield from grasp_from_above(e, position, rotation, above)
    if drag:
        yield from move_to(e, e.position + drag, rotation, GRIPPER_CLOSE, 0.015, speed=0.6, patience=25)
    yield from lift_up(e, target, rotation, lift)


def lift_up(e: Expert, target: str, rotation, height: float) -> Actions:
    """Lift the hand, and notice if the object stays behind."""
    before = e.points(target)[:, 2].min()
    yield from move_to(e, e.position + height * UP, rotation, GRIPPER_CLOSE, patience=20)
    if e.points(target)[:, 2].min() < before + 0.02:
        raise MissedGrasp(target)


def drop_into(e: Expert, target: str, container: str, shift=(0, 0), rise=0) -> Actions:
    """Carry the held object over a container, lower it below the rim, let go, and rise.

    shift: metres (2,) from the container's middle; rise: metres by which to carry it higher, over obstacles.
    """
    rotation, rim = e.rotation, e.points(container)[:, 2].max()
    middle = e.data.site(f"{container}_contain_region").xpos[:2] + shift
    height = rim + 0.03 + e.position[2] - e.points(target)[:, 2].min() + rise  # puts the object over the rim
    lifted = np.append(e.position[:2], max(height - 0.05, e.position[2] + 0.02)) + e.jitter()
    yield from move_to(e, lifted, rotation, GRIPPER_CLOSE, tolerance=0.04)
    offset = (e.points(target).max(0) + e.points(target).min(0))[:2] / 2 - e.position[:2]
    over = np.append(middle - offset, height) + e.jitter()
    yield from move_to(e, over, rotation, GRIPPER_CLOSE)
    inside = np.append(over[:2], max(over[2] - 0.09 - rise, rim + 0.015))  # the hand stays above the rim
    yield from move_to(e, inside, rotation, GRIPPER_CLOSE, tolerance=0.015, speed=0.8)
    yield from release(e, rotation)


def carried(e: Expert, target: str, goal, rotation) -> np.ndarray:
    """The hand's position (3,), turned to `rotation`, that brings the held object's origin to `goal`."""
    return goal - rotation @ e.rotation.T @ (e.spot(target) - e.position)


def place(e: Expert, target: str, on: str, shift=(0, 0), up=0.10, down=None, opening=None) -> Actions:
    """Carry the held object `up` metres over a site or an object, lower it until it touches, and let go.

    shift: metres (2,) from the middle; down: lower it to this height over the spot, whatever it touches;
    opening: the direction (3,) of the fingers, if the hand must turn.
    """
    rotation = e.rotation if opening is None else e.facing(-UP, np.array(opening, float))
    points, origin = e.points(target), e.spot(target)
    goal = e.spot(on) + [*shift, origin[2] - points[:, 2].min()]  # of the object's origin
    if down is not None:  # between walls the object's middle counts, not its origin
        goal[:2] -= (rotation @ e.rotation.T @ ((points.max(0) + points.min(0)) / 2 - origin))[:2]
    above = goal + up * UP
    rise = e.position + max(0, goal[2] + up - 0.02 - origin[2]) * UP
    yield from move_to(e, rise + e.jitter(), e.rotation, GRIPPER_CLOSE, tolerance=0.04)
    over = carried(e, target, above, rotation) + e.jitter()
    yield from move_to(e, over, rotation, GRIPPER_CLOSE, turn_tolerance=0.3)
    over = carried(e, target, above, rotation)  # once more: the object may have slipped
    yield from move_to(e, over, rotation, GRIPPER_CLOSE, tolerance=0.012, patience=20)
    for _ in range(60):
        lowered = e.touches(target) if down is None else e.spot(target)[2] < goal[2] + down
        if lowered:
            break
        below = carried(e, target, goal, rotation)
        yield e.towards(np.append(below[:2], e.position[2] - 0.04), rotation, GRIPPER_CLOSE, speed=0.6)
    yield from release(e, rotation)


def insert(e: Expert, target: str, site: str, path: list[tuple], pitch=0) -> Actions:
    """Bring the held object's origin through a path of points in a site's frame (metres), and let go.

    pitch: degrees by which the hand turns about the world's x axis on the way to the first point.
    """
    rotation = Rotation.from_euler("x", pitch, degrees=True).as_matrix() @ e.rotation
    goals = [e.spot(site) + e.data.site(site).xmat.reshape(3, 3) @ point for point in path]
    for number, goal in enumerate(goals):  # fast to the first point, then slowly and closely
        tolerance, speed, patience = (0.008, 0.5, 45) if number else (0.03, 1.0, 90)
        for _ in range(patience):
            position = carried(e, target, goal, rotation)
            if e.near(position, rotation, tolerance, 0.2):
                break
            yield e.towards(position, rotation, GRIPPER_CLOSE, speed)
    yield from release(e, rotation, away=-rotation[:, 2])


def release(e: Expert, rotation, away=UP) -> Actions:
    """Open the fingers in place until the object is free, then move 10 cm away."""
    position, free = e.position, min(e.gap + 0.02, 0.075)
    for _ in range(8):
        if e.gap <= free:
            yield e.towards(position, rotation, GRIPPER_OPEN)
    yield from move_to(e, position + 0.10 * away, rotation, GRIPPER_OPEN, speed=0.7, patience=30)


def slide(e: Expert, target: str, to: str, radius=0.064, height=0.009) -> Actions:
    """Pinch the rim of a plate on the side of its goal, and slide the plate there over the table."""
    middle, goal, obstacles = e.spot(target), e.spot(to), e.obstacles(target)
    ahead = np.arctan2(*(goal - middle)[1::-1])

    def pinch(turn):
        opening = np.array([np.cos(ahead + turn), np.sin(ahead + turn), 0])
        return middle + radius * opening + height * UP, opening

    def cost(turn):
        return collisions(obstacles, *pinch(turn)) + 0.5 * abs(turn)

    position, opening = pinch(min(np.deg2rad([0, 15, -15, 30, -30, 45, -45, 60, -60]), key=cost))
    rotation = e.facing(-UP, opening)
    yield from grasp_from_above(e, position, rotation)
    for _ in range(90):
        way = (goal - e.spot(target))[:2]
        if np.linalg.norm(way) < 0.012:
            break
        yield e.towards(np.append(e.position[:2] + way, position[2] + 0.004), rotation, GRIPPER_CLOSE, 0.5)
    yield from release(e, rotation)


def follow(e: Expert, joint: str, to: float, rotation, at=None, lead=0.05, turns=True) -> Actions:
    """Move a joint to a coordinate (metres or radians) with the closed hand, which stays where it holds on.

    at: where the hand shall be, if not where it is now; lead: how far ahead of the joint it aims;
    turns: whether it turns with the joint.
    """
    kind, now = e.model.joint(joint), e.data.joint(joint)  # views: they show each step's values
    body = e.data.body(kind.bodyid[0])
    frame = body.xmat.reshape(3, 3)
    here = frame.T @ ((e.position if at is None else at) - body.xpos)
    held = frame.T @ rotation
    sign = np.sign(to - now.qpos[0])
    for _ in range(100):
        if sign * (to - now.qpos[0]) <= 0:
            return
        position, step = body.xpos + frame @ here, sign * lead * now.xaxis
        if kind.type == SLIDE:
            position = position + step
        else:
            ahead = Rotation.from_rotvec(step).as_matrix()
            position = now.xanchor + ahead @ (position - now.xanchor)
            rotation = ahead @ frame @ held if turns else rotation
        yield e.towards(position, rotation, GRIPPER_CLOSE, speed=0.6)


def leaning(tilt: float, out: np.ndarray) -> np.ndarray:
    """The direction (3,) of a hand that leans by `tilt` degrees from straight down against `out`."""
    return -np.sin(np.deg2rad(tilt)) * out - np.cos(np.deg2rad(tilt)) * UP


def seize(e: Expert, bar, out, opening, tilt: float, past: float) -> Generator[np.ndarray, None, np.ndarray]:
    """Grasp a bar or handle that sticks out along `out`; returns the hand's rotation (3, 3).

    tilt: degrees from straight down; past: metres by which the hand goes beyond the bar.
    """
    approach = leaning(tilt, out)
    rotation = e.facing(approach, opening)
    high = bar - 0.10 * approach + 0.03 * out + 0.10 * UP
    yield from move_to(e, high + e.jitter(), rotation, GRIPPER_OPEN, 0.05, 0.5)
    yield from move_to(e, bar - 0.09 * approach, rotation, GRIPPER_OPEN, 0.015, 0.12)
    yield from move_to(e, bar + past * approach, rotation, GRIPPER_OPEN, 0.007, 0.15, speed=0.6, patience=30)
    yield from grip(e, bar + past * approach, rotation)
    return rotation


def pull_open(e: Expert, joint: str, to: float, tilt: float) -> Actions:
    """Open a drawer by its bar, with one finger above and one below it."""
    bar, out = e.handle(joint)
    rotation = yield from seize(e, bar, out, UP, tilt, past=0.012)
    yield from follow(e, joint, to, rotation)
    yield from release(e, rotation, away=-rotation[:, 2])


def push_shut(e: Expert, joint: str, tilt: float, lead=0.05) -> Actions:
    """Close a drawer or a door with the fist against its handle."""
    bar, out = e.handle(joint)
    rotation = e.facing(leaning(tilt, out), np.cross(UP, out))
    before = bar + 0.07 * out + 0.02 * UP
    top = max(e.position[2], bar[2] + 0.25)
    yield from move_to(e, np.append(e.position[:2], top), e.rotation, GRIPPER_CLOSE, 0.04)
    yield from move_to(e, np.append(before[:2], top) + e.jitter(), rotation, GRIPPER_CLOSE, 0.04, 0.4)
    yield from move_to(e, before, rotation, GRIPPER_CLOSE, 0.02, 0.15)
    yield from follow(e, joint, 0.0, rotation, bar + 0.01 * out, lead, turns=False)
    yield from move_to(e, e.position + 0.06 * out, rotation, GRIPPER_CLOSE, patience=12)


def turn_knob(e: Expert, joint: str, to=0.9) -> Actions:
    """Grasp the ridge of a knob from above and turn it to a coordinate (radians)."""
    body = e.model.joint(joint).bodyid
    across, along = e.data.xmat[body].reshape(3, 3).T[:2]  # of the ridge
    top = e.body_points(body)[:, 2].max()
    position = np.append(e.data.joint(joint).xanchor[:2], top - 0.012) + 0.005 * along
    rotation = e.facing(-UP, across)
    yield from grasp_from_above(e, position, rotation)
    yield from follow(e, joint, to, rotation, lead=0.6)
    yield from release(e, e.rotation)


def pick_handle(e: Expert, target: str, tilt=45, lift=0.07) -> Actions:
    """Grasp a mug by its handle, with the hand leaning away from it, and lift it."""
    points = e.points(target)
    offset = (points - e.spot(target))[:, :2]

    def along(angle):
        return offset @ [np.cos(angle), np.sin(angle)]  # (N,)

    # a handle is narrow and far out: the width of the outermost 12 mm, minus half the distance
    def cost(angle):
        across = offset @ [-np.sin(angle), np.cos(angle)]
        return np.ptp(across[along(angle) > along(angle).max() - 0.012]) - 0.5 * along(angle).max()

    angle = min(np.deg2rad(range(0, 360, 5)), key=cost)
    out = np.array([np.cos(angle), np.sin(angle), 0])
    bar = points[along(angle) > along(angle).max() - 0.018].mean(0)
    rotation = yield from seize(e, bar, out, np.cross(UP, out), tilt, past=0.004)
    yield from lift_up(e, target, rotation, lift)


# ------------------------------------------------------------------------------------------------------ tasks
BOWL = "akita_black_bowl_1"
YELLOW_MUG = "white_yellow_mug_1"
BOTTLE = "wine_bottle_1"
CABINET = "wooden_cabinet_1"
BURNER = "flat_stove_1_cook_region"


def carry(pick, target: str, on: str, grasp: dict, **where) -> list[partial]:
    """Pick an object up and place it on something."""
    return [partial(pick, target=target, **grasp), partial(place, target=target, on=on, **where)]


def bowl(on: str, **where) -> list[partial]:
    return carry(pick_rim, BOWL, on, {"goal": on}, **where)


def into_basket(name: str, shift=(0, 0), rise=0, **grasp) -> list[partial]:
    return [
        partial(pick_top, target=name, **grasp),
        partial(drop_into, target=name, container="basket_1", shift=shift, rise=rise),
    ]


def both_into_basket(first: str, second: str) -> list[partial]:
    high = {"above": 0.18, "rise": 0.08}  # over the cartons, which fall when they are touched
    return into_basket(first, shift=(0.03, 0), **high) + into_basket(second, shift=(-0.03, 0), **high)


SUITES = {
    "libero_object": [
        into_basket("alphabet_soup_1"),
        into_basket("cream_cheese_1"),
        into_basket("salad_dressing_1"),
        into_basket("bbq_sauce_1"),
        into_basket("ketchup_1"),
        into_basket("tomato_sauce_1"),
        into_basket("butter_1"),
        into_basket("milk_1", depth=0.030),  # any higher, and the gable of a carton wedges the fingers
        into_basket("chocolate_pudding_1"),
        # across the roof: its ends hook on open fingers
        into_basket("orange_juice_1", depth=0.030, yaws=range(70, 115, 5)),
    ],
    "libero_spatial": [
        *[bowl("plate_1")] * 4,
        # out of a drawer: nearer to the rim than elsewhere
        carry(pick_rim, BOWL, "plate_1", {"goal": "plate_1", "depth": 0.018, "lift": 0.14}),
        *[bowl("plate_1")] * 5,
    ],
    "libero_goal": [
        [partial(pull_open, joint=f"{CABINET}_middle_level", to=-0.15, tilt=80)],
        bowl(BURNER),
        carry(pick_top, BOTTLE, f"{CABINET}_top_side", {"depth": 0.030}, shift=(0, 0.03)),
        [
            partial(pull_open, joint=f"{CABINET}_top_level", to=-0.133, tilt=70),
            # The open drawer hangs over the bowl: turn above it, grasp on the robot's side, and draw the bowl
            # out before lifting it.
            *carry(
                pick_rim,
                BOWL,
                f"{CABINET}_top_region",
                {
                    "depth": 0.024,
                    "angles": [180],
                    "pitch": 30,
                    "lift": 0.12,
                    "drag": (-0.09, 0.02, 0.012),
                    "above": 0.2,
                },
                shift=(0.012, 0.012),
            ),
        ],
        bowl(f"{CABINET}_top_side", shift=(0, 0.02)),
        [partial(slide, target="plate_1", to="main_table_stove_front_region")],
        carry(pick_top, "cream_cheese_1", BOWL, {"depth": 0.012}),
        [partial(turn_knob, joint="flat_stove_1_button")],
        bowl("plate_1"),
        [
            partial(pick_top, target=BOTTLE, depth=0.035, yaws=[90], lift=0.15),
            partial(
                insert,
                target=BOTTLE,
                site="wine_rack_1_top_region",
                pitch=60,
                path=[
                    (0, -0.10, 0.05),
                    (0, -0.06, 0.04),
                    (0, -0.03, 0.03),
                    (0, -0.018, 0.02),
                    (0, -0.012, 0.012),
                ],
            ),
        ],
    ],
    "libero_10": [
        both_into_basket("alphabet_soup_1", "tomato_sauce_1"),
        both_into_basket("cream_cheese_1", "butter_1"),
        [
            partial(turn_knob, joint="flat_stove_1_button"),
            *carry(pick_top, "moka_pot_1", BURNER, {"depth": 0.030}),
        ],
        [
            *bowl("white_cabinet_1_bottom_region", up=0.13),
            partial(push_shut, joint="white_cabinet_1_bottom_level", tilt=50),
        ],
        [
            *carry(pick_rim, "porcelain_mug_1", "plate_1", {"depth": 0.025}),
            *carry(pick_rim, YELLOW_MUG, "plate_2", {"depth": 0.025}),
        ],
        carry(
            pick_top,
            "black_book_1",
            "desk_caddy_1_back_contain_region",
            {"depth": 0.030, "lift": 0.10},
            opening=(1, 0, 0),
            down=-0.05,
        ),
        [
            *carry(pick_rim, "porcelain_mug_1", "plate_1", {"depth": 0.025}),
            *carry(
                pick_top,
                "chocolate_pudding_1",
                "living_room_table_plate_right_region",
                {"depth": 0.016},
                shift=(0, 0.01),
            ),
        ],
        both_into_basket("alphabet_soup_1", "cream_cheese_1"),
        [
            *carry(pick_top, "moka_pot_2", BURNER, {"depth": 0.030}, shift=(0.045, 0)),
            *carry(pick_top, "moka_pot_1", BURNER, {"depth": 0.030}, shift=(-0.045, 0)),
        ],
        [
            partial(pick_handle, target=YELLOW_MUG),
            partial(
                insert,
                target=YELLOW_MUG,
                site="microwave_1_heating_region",
                path=[
                    (-0.035, -0.197, -0.042),
                    (-0.035, -0.197, -0.052),
                    (-0.035, 0, -0.054),
                    (-0.035, -0.01, -0.075),
                ],
            ),
            partial(push_shut, joint="microwave_1_microjoint", tilt=0, lead=0.4),
        ],
    ],
}
TASKS = {(suite, task): steps for suite, rows in SUITES.items() for task, steps in enumerate(rows)}
# in the swapped layout these steps fail in every try
UNSOLVED = {("libero_spatial", 4), ("libero_goal", 3), ("libero_goal", 5), ("libero_10", 3), ("libero_10", 9)}
TASKS |= {(f"{pair[0]}_swap", pair[1]): TASKS[pair] for pair in TASKS if pair not in UNSOLVED}
TASKS["libero_object_swap", 8] = into_basket("chocolate_pudding_1", above=0.18)  # a carton stands on the way
TASKS |= {("libero_object_look", task): TASKS["libero_object_swap", task] for task in range(10)}


def target_places(env: TaskEnv, init_state: int) -> np.ndarray:
    """Where the object that the expert takes first stands in an init state: here, in the other layout.

    The other one of a LIBERO suite is the swapped one, that of LIBERO-PRO's is LIBERO's.
    Returns (2, 3), metres, or NaN where a task has no other layout, begins with a drawer or a stove, or with
    an object that moves by less than the 5 cm by which places vary between init states.
    """
    other = LAYOUTS.get(env.suite, f"{env.suite}_swap")
    steps = TASKS.get((LAYOUTS.get(env.suite, env.suite), env.task_id))
    target = steps and steps[0].keywords.get("target")
    if target is None or other not in MAX_STEPS:
        return np.full((2, 3), np.nan)
    at = 1 + env.model.joint(f"{target}_joint0").qposadr[0]  # behind the time
    both = [init_state_array(suite, env.task_id)[init_state, at : at + 3] for suite in (env.suite, other)]
    return np.where(np.linalg.norm(both[0] - both[1]) > 0.05, both, np.nan)
