"""A Flower App that does nothing, written as Flower's templates are: what a round of Flower costs."""
