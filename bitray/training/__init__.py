"""What happens inside one worker: the one loop, state, sharding, teachers, metrics. No Ray."""
