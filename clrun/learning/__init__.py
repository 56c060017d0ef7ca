"""What an author of a method imports: the base class, budget, context, `fit`, optimizers and knobs."""
