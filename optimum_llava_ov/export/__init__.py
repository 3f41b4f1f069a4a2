"""Stage 4: from the torch model to OpenVINO IR, through Optimum."""
