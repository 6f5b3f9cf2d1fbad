"""Tests of the topics that run over the stores of servers as well."""
