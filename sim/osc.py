"""LIBERO's controller: robosuite 1.4's OSC_POSE and its gripper, equal in every bit.

robosuite spends most of a control step on look-ups, format checks and histories that nobody reads. This file
keeps the operations that a torque depends on, and calls robosuite's own compiled functions. The order of
operations and the memory layout are robosuite's too: both decide the last bits. The state stays in
robosuite's objects, so its own control steps and these may alternate.

Import after `env.libraries()`. tests/test_sim.py compares with robosuite's loop.
"""

import ctypes
from operator import attrgetter
from pathlib import Path

import llvmlite.binding
import mujoco
import numba
import numpy as np
from numba.types import ExternalFunction, int32, intp, void
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

# mujoco's own C functions, for compiled code. The first two arguments of most are model and data.
llvmlite.binding.load_library_permanently(str(next(Path(mujoco.__file__).parent.glob("libmujoco.*"))))
mj_forwardSkip = ExternalFunction("mj_forwardSkip", void(intp, intp, int32, int32))
mj_fwdConstraint = ExternalFunction("mj_fwdConstraint", void(intp, intp))
mj_jacSite = ExternalFunction("mj_jacSite", void(intp, intp, intp, intp, int32))
mj_fullM = ExternalFunction("mj_fullM", void(intp, intp, intp))
mj_step2 = ExternalFunction("mj_step2", void(intp, intp))

NBVH = 20  # bytes in mjModel before `int nbvh`
GOAL = attrgetter("kp", "kd", "goal_pos", "goal_ori", "initial_joint")  # of robosuite's controller
MOTION = attrgetter(  # of the hand, then of the arm
    *("ee_pos", "ee_ori_mat", "ee_pos_vel", "ee_ori_vel", "joint_pos", "joint_vel"),
    *("J_full", "J_pos", "J_ori", "mass_matrix"),
)


def consecutive(indexes) -> slice:
    """The slice that selects the same elements. It makes views, which are quicker than copies by index."""
    first = int(indexes[0])
    assert list(indexes) == list(range(first, first + len(indexes))), indexes
    return slice(first, first + len(indexes))


@numba.njit(cache=True)
def look(sim, arm, motion):
    """Read the arm's state into `motion`, robosuite's arrays.

    robosuite evaluates the dynamics again before it reads. Nothing has changed, but the constraint solver
    starts from the solution just found.
    """
    model, data, site, inertia, masses, spatial, first = sim
    mj_fwdConstraint(model, data)
    mj_jacSite(model, data, spatial[:3].ctypes.data, spatial[3:].ctypes.data, site)
    mj_fullM(model, masses.ctypes.data, inertia.ctypes.data)
    (at, turn, q, v), (pos, ori, vel, spin, joints, speeds, jac, jac_pos, jac_ori, mass) = arm, motion
    dofs = slice(first, first + len(joints))
    pos[:], ori[:], joints[:], speeds[:] = at, turn, q, v[dofs]
    vel[:], spin[:] = np.dot(spatial[:3], v), np.dot(spatial[3:], v)
    jac[:], jac_pos[:], jac_ori[:] = spatial[:, dofs], spatial[:3, dofs], spatial[3:, dofs]
    mass[:] = masses[dofs, dofs]


@numba.njit(cache=True)
def drive(goal, motion, bias):
    """The joint torques (7,) of operational space control (Khatib 1987).

    The hand's force is F = kp e - kd v, its torque likewise, and each is decoupled by its own 3x3 inertia.
    The joint torques are J^T F + gravity + a pull towards the posture `rest` in the hand's null space.
    """
    kp, kd, goal_pos, goal_ori, rest = goal
    pos, ori, vel, spin, joints, speeds, jac, jac_pos, jac_ori, mass = motion
    force = kp[:3] * (goal_pos - pos) - kd[:3] * vel
    torque = kp[3:] * orientation_error(goal_ori, ori) - kd[3:] * spin
    _, inertia_pos, inertia_ori, nullspace = opspace_matrices(mass, jac, jac_pos, jac_ori)
    wrench = np.concatenate((np.dot(inertia_pos, force), np.dot(inertia_ori, torque)))  # (6,)
    return np.dot(jac.T, wrench) + bias + nullspace_torques(mass, nullspace, rest, joints, speeds)


@numba.njit(cache=True)
def command(goal, motion, motors, closing, grip):
    """Write the motor commands of one substep; returns the torques, and how far the gripper is told to close
    (from -1 to 1), which was `grip` before.
    """
    bias, ctrl, low, high, grip_ctrl, middle, span = motors
    torques, grip = drive(goal, motion, bias), np.minimum(np.maximum(grip + closing, -1.0), 1.0)
    ctrl[:] = np.minimum(np.maximum(torques, low), high)
    grip_ctrl[:] = middle + span * grip
    return torques, grip


@numba.njit(cache=True)
def advance(n, sim, arm, goal, motion, motors, closing, torques, grip):
    """n times the rest of a substep, the first half of the next one, and its command."""
    for _ in range(n):
        mj_step2(sim[0], sim[1])  # mj_step without its first half
        mj_forwardSkip(sim[0], sim[1], 0, 1)  # all stages, no sensors
        look(sim, arm, motion)
        torques, grip = command(goal, motion, motors, closing, grip)
    return torques, grip


class Controller:
    """Turns actions into motor commands. In a control step call `begin` once, after its first forward
    dynamics, then `advance`.

    state: robosuite's controller object. It holds the goal, and what `look` reads of the arm.
    """

    def __init__(self, robot, model: mujoco.MjModel, data: mujoco.MjData):
        self.state, self.hand, site = robot.controller, robot.gripper, robot.eef_site_id
        joints = data.qpos[consecutive(robot._ref_joint_pos_indexes)]  # views of mujoco's memory
        self.arm = data.site_xpos[site], data.site_xmat[site].reshape(3, 3), joints, data.qvel
        dofs, grip = consecutive(robot._ref_joint_vel_indexes), robot._ref_joint_gripper_actuator_indexes
        jacobian, mass = np.zeros((6, model.nv)), np.zeros((model.nv, model.nv))  # work space
        self.sim = model._address, data._address, site, data.qM, mass, jacobian, dofs.start
        self.boxes = np.ctypeslib.as_array((ctypes.c_int * 1).from_address(model._address + NBVH))
        assert self.boxes == model.nbvh > 0, "another version's mjModel"
        low, high = model.actuator_ctrlrange[grip].T
        arm = data.ctrl[consecutive(robot._ref_joint_actuator_indexes)]
        hand = data.ctrl[consecutive(grip)], 0.5 * (high + low), 0.5 * (high - low)
        self.motors = data.qfrc_bias[dofs], arm, *robot.torque_limits, *hand

    def begin(self, action: np.ndarray) -> None:
        """Take a new action (7,), and command the motors for a substep. Its goal is relative to where the
        hand is now.
        """
        c, hand = self.state, self.hand
        if c.new_update:  # right after a reset the standard protocol does not look: it works on an old state
            look(self.sim, self.arm, MOTION(c))
            c.new_update = False
        c.set_goal(action[:6])
        self.closing = np.array([-1.0, 1.0]) * hand.speed * np.sign(action[6:])
        commands = GOAL(c), MOTION(c), self.motors, self.closing, hand.current_action
        (c.torques, hand.current_action), c.new_update = command(*commands), True

    def advance(self, n: int) -> None:
        """Finish a substep, begin the next one and command its motors; and so n times.

        In each of them mujoco clears a list of the bounding boxes that it tested, 0.8 MB, which only pictures
        of these boxes read: a seventh of the time. Told that there are none, it clears nothing.
        """
        c, hand, number = self.state, self.hand, self.boxes[0]
        self.boxes[0] = 0
        try:
            c.torques, hand.current_action = advance(
                n,
                self.sim,
                self.arm,
                GOAL(c),
                MOTION(c),
                self.motors,
                self.closing,
                c.torques,
                hand.current_action,
            )
        finally:
            self.boxes[0] = number
