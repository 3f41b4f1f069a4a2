"""Export the torch model to OpenVINO IR with Optimum."""
