"Cross-model memory: trajectories, verified contrast, a bank of constraints (MemCollab)."
