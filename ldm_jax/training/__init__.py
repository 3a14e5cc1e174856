"""Training: the tasks, their optimisation and the one loop that drives them."""
