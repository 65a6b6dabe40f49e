"""The paper's networks on the fast layers, and their way to and from the Hugging Face Hub."""
