"""The tests, which mirror the packages; :mod:`tests.support` holds what several of them share."""
