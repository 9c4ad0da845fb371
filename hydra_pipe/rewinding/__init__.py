"""A step of a training, looked at again: its samples, its gradient, its effect on the tests."""
