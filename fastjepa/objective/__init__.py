"""What is learned: targets, dense losses, the context ramp, and the health of the features."""
