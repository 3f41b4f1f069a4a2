"""Answer many requests at the same time, for servers and for data sets."""
