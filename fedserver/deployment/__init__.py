"""A server that devices can join over a network: certificates, front door, enrolment, processes."""
