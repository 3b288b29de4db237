"""What people look at: HTML pages and curves. Training loads none of it before its end."""
