"""The judge as a service: a local HTTP server with the protocols of those who train image generators."""
