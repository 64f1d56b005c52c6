"""Keeps a run safe and portable. You do not need to edit it to change how a model is trained."""
