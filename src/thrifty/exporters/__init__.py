"""The programs that a run's plan can be handed to: one file each, the command's name its file's."""
