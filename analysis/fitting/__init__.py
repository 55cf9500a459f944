"""Fitting a law: the solver, the bootstrap, profiles, and checks of the residuals."""
