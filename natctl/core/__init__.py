"""The deciding half of natd: pure, inputs in and commands out."""
