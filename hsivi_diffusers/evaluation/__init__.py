"""What samplers are measured with: images, features, distances, and the solvers they are compared to."""
