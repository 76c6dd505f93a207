"""The parts of the commands that train on coloured MNIST."""
