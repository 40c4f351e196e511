"""Parameter groups and the schedules of learning rate, weight decay and EMA momentum."""
