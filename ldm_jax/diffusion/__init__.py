"""The mathematics of diffusion: pure functions of arrays, no networks and no parameters."""
