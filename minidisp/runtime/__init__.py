"""What keeps a run safe and portable; nobody needs to open it to change how a model is trained."""
