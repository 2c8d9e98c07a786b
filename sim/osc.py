"""LIBERO's controller: robosuite 1.4's OSC_POSE and its gripper, equal in every bit.

robosuite spends most of a control step on look-ups, format checks and histories that nobody reads. This file
keeps the operations that a torque depends on, and calls robosuite's own compiled functions. The order of
operations and the memory layout are robosuite's too: both decide the last bits. The state stays in
robosuite's objects, so its own control steps and these may alternate.

Import after `env.libraries()`. tests/test_sim.py compares with robosuite's loop.
"""

import mujoco
import numpy as np
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error


def consecutive(indexes) -> slice:
    """The slice that selects the same elements. It makes views, which are quicker than copies by index."""
    first = int(indexes[0])
    assert list(indexes) == list(range(first, first + len(indexes))), indexes
    return slice(first, first + len(indexes))


class Controller:
    """Turns actions into motor commands.

    Call `begin` once in a control step, after its first forward dynamics, and `actuate` in every substep.
    state: robosuite's controller object. It holds the goal, and what `_look` reads of the arm.
    """

    def __init__(self, robot, model: mujoco.MjModel, data: mujoco.MjData):
        self.model, self.data = model, data
        self.state, self.hand, self.site = robot.controller, robot.gripper, robot.eef_site_id
        self.qpos = consecutive(robot._ref_joint_pos_indexes)
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
        """Write the motor commands of one substep to data.ctrl.

        Operational space control (Khatib 1987): the hand's force is F = kp e - kd v, its torque likewise, and
        each is decoupled by its own 3x3 inertia. The joint torques are J^T F + gravity + a pull towards the
        initial posture in the null space of the hand.
        """
        self._look()
        c, data = self.state, self.data
        force = c.kp[:3] * (c.goal_pos - c.ee_pos) - c.kd[:3] * c.ee_pos_vel
        torque = c.kp[3:] * orientation_error(c.goal_ori, c.ee_ori_mat) - c.kd[3:] * c.ee_ori_vel
        _, inertia_pos, inertia_ori, nullspace = opspace_matrices(c.mass_matrix, c.J_full, c.J_pos, c.J_ori)
        wrench = np.concatenate([np.dot(inertia_pos, force), np.dot(inertia_ori, torque)])  # (6,)
        posture = nullspace_torques(c.mass_matrix, nullspace, c.initial_joint, c.joint_pos, c.joint_vel)
        c.torques = np.dot(c.J_full.T, wrench) + data.qfrc_bias[self.dofs] + posture  # (7,)
        c.new_update = True
        data.ctrl[self.motors] = np.minimum(np.maximum(c.torques, self.low), self.high)
        self.hand.current_action = np.minimum(np.maximum(self.hand.current_action + self.closing, -1.0), 1.0)
        data.ctrl[self.grip] = self.grip_middle + self.grip_span * self.hand.current_action

    def _look(self) -> None:
        """Read the arm's state, once in a substep.

        robosuite evaluates the dynamics again before it reads. Nothing has changed, but the constraint solver
        starts from the solution just found. Right after a reset the standard protocol does not look: the
        first action works on an old state.
        """
        c, data, site, dofs = self.state, self.data, self.site, self.dofs
        if not c.new_update:
            return
        mujoco.mj_fwdConstraint(self.model, data)
        mujoco.mj_jacSite(self.model, data, self.jacobian[:3], self.jacobian[3:], site)
        mujoco.mj_fullM(self.model, self.mass, data.qM)
        c.ee_pos, c.ee_ori_mat = data.site_xpos[site].copy(), data.site_xmat[site].reshape(3, 3).copy()
        c.ee_pos_vel, c.ee_ori_vel = (
            np.dot(self.jacobian[:3], data.qvel),
            np.dot(self.jacobian[3:], data.qvel),
        )
        c.joint_pos, c.joint_vel = data.qpos[self.qpos].copy(), data.qvel[dofs].copy()
        c.J_full = np.array(self.jacobian[:, dofs], order="F")  # (6, 7)
        c.J_pos = np.array(self.jacobian[:3, dofs], order="F")
        c.J_ori = np.array(self.jacobian[3:, dofs], order="F")
        c.mass_matrix = np.array(self.mass[dofs, dofs], order="F")  # (7, 7)
        c.new_update = False
