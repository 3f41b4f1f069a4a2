"""Stage 3: from the torch model to OpenVINO IR, through Optimum."""
