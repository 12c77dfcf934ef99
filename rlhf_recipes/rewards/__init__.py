"""r(x, y): each kind of reward a file, and their sum."""
