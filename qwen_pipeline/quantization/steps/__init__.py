"""Steps of a recipe, each by its own method, and the solver that puts those of one linear layer together."""
