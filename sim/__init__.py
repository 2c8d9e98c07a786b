"""LIBERO: the simulator (env), its controller (osc), and a scripted expert (expert, grasps)."""
