"""What the activations of a selection are like in numbers, and the scale that follows from it."""
