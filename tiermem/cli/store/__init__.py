"""Commands that look into the directory of an SSD store: ls, show, explain, verify, du, gc."""
