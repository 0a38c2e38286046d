"""What follows a failed save."""
