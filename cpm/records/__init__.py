"""Entries of the journal as other systems take them: lines of JSON and CSV, syslog messages, IPFIX messages. Pure."""
