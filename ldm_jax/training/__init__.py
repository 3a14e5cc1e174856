"""Training: the tasks, their optimisation and the loop that runs them."""
