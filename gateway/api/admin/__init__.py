"""What may an admin do over HTTP? Each file is one resource, and asks for an admin's key itself."""
