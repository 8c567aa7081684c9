"""Problems whose flows are known exactly."""
