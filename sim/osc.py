"""LIBERO's controller: robosuite 1.4's OSC_POSE and its gripper, equal in every bit.

robosuite spends most of a control step on look-ups, format checks and histories that nobody reads. This file
keeps the operations that a torque depends on, and calls robosuite's own compiled functions. The order of
operations and the memory layout are robosuite's too: both decide the last bits. The state stays in
robosuite's objects, so its own control steps and these may alternate.

Import after `env.libraries()`. tests/test_sim.py compares with robosuite's loop.
"""

from operator import attrgetter

import mujoco
import numba
import numpy as np
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

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
def look(
    at, turn, q, v, masses, spatial, first, pos, ori, vel, spin, joints, speeds, jac, jac_pos, jac_ori, mass
):
    """Fill the last ten arrays, robosuite's, from mujoco's; the arm's degrees of freedom begin at `first`."""
    dofs = slice(first, first + len(joints))
    pos[:], ori[:], joints[:], speeds[:] = at, turn, q, v[dofs]
    vel[:], spin[:] = np.dot(spatial[:3], v), np.dot(spatial[3:], v)
    jac[:], jac_pos[:], jac_ori[:] = spatial[:, dofs], spatial[:3, dofs], spatial[3:, dofs]
    mass[:] = masses[dofs, dofs]


@numba.njit(cache=True)
def drive(
    kp, kd, goal_pos, goal_ori, rest, bias, pos, ori, vel, spin, joints, speeds, jac, jac_pos, jac_ori, mass
):
    """The joint torques (7,) of operational space control (Khatib 1987).

    The hand's force is F = kp e - kd v, its torque likewise, and each is decoupled by its own 3x3 inertia.
    The joint torques are J^T F + gravity + a pull towards the posture `rest` in the hand's null space.
    """
    force = kp[:3] * (goal_pos - pos) - kd[:3] * vel
    torque = kp[3:] * orientation_error(goal_ori, ori) - kd[3:] * spin
    _, inertia_pos, inertia_ori, nullspace = opspace_matrices(mass, jac, jac_pos, jac_ori)
    wrench = np.concatenate((np.dot(inertia_pos, force), np.dot(inertia_ori, torque)))  # (6,)
    return np.dot(jac.T, wrench) + bias + nullspace_torques(mass, nullspace, rest, joints, speeds)


class Controller:
    """Turns actions into motor commands.

    Call `begin` once in a control step, after its first forward dynamics, and `actuate` in every substep.
    state: robosuite's controller object. It holds the goal, and what `_look` reads of the arm.
    """

    def __init__(self, robot, model: mujoco.MjModel, data: mujoco.MjData):
        self.model, self.data = model, data
        self.state, self.hand, self.site = robot.controller, robot.gripper, robot.eef_site_id
        joints = data.qpos[consecutive(robot._ref_joint_pos_indexes)]  # views of mujoco's memory
        self.arm = data.site_xpos[self.site], data.site_xmat[self.site].reshape(3, 3), joints, data.qvel
        self.dofs = consecutive(robot._ref_joint_vel_indexes)
        self.motors = consecutive(robot._ref_joint_actuator_indexes)
        self.low, self.high = robot.torque_limits
        self.grip = robot._ref_joint_gripper_actuator_indexes
        low, high = model.actuator_ctrlrange[self.grip].T
        self.grip_middle, self.grip_span = 0.5 * (high + low), 0.5 * (high - low)
        self.jacobian, self.mass = np.zeros((6, model.nv)), np.zeros((model.nv, model.nv))  # work space

    def begin(self, action: np.ndarray) -> None:
        """Take a new action (7,). Its goal is relative to where the hand is now."""
        self._look()
        self.state.set_goal(action[:6])
        self.closing = np.array([-1.0, 1.0]) * self.hand.speed * np.sign(action[6:])

    def actuate(self) -> None:
        """Write the motor commands of one substep to data.ctrl."""
        self._look()
        c, ctrl, hand = self.state, self.data.ctrl, self.hand
        c.torques, c.new_update = drive(*GOAL(c), self.data.qfrc_bias[self.dofs], *MOTION(c)), True
        ctrl[self.motors] = np.minimum(np.maximum(c.torques, self.low), self.high)
        hand.current_action = np.minimum(np.maximum(hand.current_action + self.closing, -1.0), 1.0)
        ctrl[self.grip] = self.grip_middle + self.grip_span * hand.current_action

    def _look(self) -> None:
        """Read the arm's state, once in a substep.

        robosuite evaluates the dynamics again before it reads. Nothing has changed, but the constraint solver
        starts from the solution just found. Right after a reset the standard protocol does not look: the
        first action works on an old state.
        """
        if self.state.new_update:
            mujoco.mj_fwdConstraint(self.model, self.data)
            mujoco.mj_jacSite(self.model, self.data, self.jacobian[:3], self.jacobian[3:], self.site)
            mujoco.mj_fullM(self.model, self.mass, self.data.qM)
            look(*self.arm, self.mass, self.jacobian, self.dofs.start, *MOTION(self.state))
            self.state.new_update = False
