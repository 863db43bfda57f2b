"""What a deployed server withstands at its edge: a real server on loopback, attacked within bounds."""
