"""What a server and a device share: supervised processes, private files, the words of enrolment."""
