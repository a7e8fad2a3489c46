"""What is searched and how: rescale factors, baselines, the space, the operators, the evolution and its driver loop."""
