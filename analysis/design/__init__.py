"""The design of a study before it is trained: priors, simulations, budgets, the next step up."""
