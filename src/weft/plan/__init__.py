"""Specs -> Plan; from headers and configs alone, no weight is read and no file is open."""
