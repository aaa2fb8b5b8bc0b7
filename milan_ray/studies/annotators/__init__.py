"""What people's annotations are like."""
