"""An example of a plug-in for mergence: the method `distinct` and the family `plainvit`."""
